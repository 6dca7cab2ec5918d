"""What each expert is worth; several merged; routers from texts; LoRA adapters that become experts;
refusals."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpoe import (
    collect_statistics,
    compose_experts,
    convert_to_mpoe,
    load_expert,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.config import MPOEConfig
from mpoe.data.predict import token_losses
from mpoe.inspection import composed_worth
from mpoe.models.expert_files import made_expert
from mpoe.models.lora_fit import check_adapter, fit_adapter, is_adapter
from mpoe.models.walk import neuron_modules
from tests.assertions import differing, read_json, refuses, write_json

from .tiny_models import (
    M,
    dense_model,
    domain,
    fit,
    language_model,
    lessons,
    loss,
    mixture_of,
    stirred,
    tokenizer,
)


@pytest.fixture
def composed(domains):
    mixture = mixture_of(domains)
    classes = [
        *(load_expert(file).statistics for file in domains.files),
        mixture.background_statistics,
    ]
    return SimpleNamespace(mixture=mixture, classes=classes)


def test_worth(domains, composed):
    batches = [*domain(0, seed=9), *domain(1, seed=9)]
    before = [layer.router for layer in neuron_modules(composed.mixture).values()]
    texts = {"both": batches, "first": domain(0, seed=9)}
    worths = composed_worth(composed.mixture, composed.classes, texts)
    assert list(worths) == ["both", "first"]
    assert worths["first"].loss == pytest.approx(loss(composed.mixture, 0), abs=1e-4)
    assert worths["first"].alone[0] < worths["first"].alone[1]
    assert worths["first"].share[0] > 0.6
    found = worths["both"]
    assert [layer.router for layer in neuron_modules(composed.mixture).values()] == before
    assert found.names == ["domain0", "domain1", "none"]
    assert found.tokens == 2 * 32 * 15
    assert sum(found.share) == pytest.approx(1.0)
    assert found.loss == pytest.approx(
        (loss(composed.mixture, 0) + loss(composed.mixture, 1)) / 2, abs=1e-4
    )
    assert found.alone[2] == pytest.approx(
        (loss(domains.base, 0) + loss(domains.base, 1)) / 2, abs=1e-4
    )
    for number, file in enumerate(domains.files):
        on = start_expert(domains.base, expert=file)
        assert found.alone[number] == pytest.approx(
            float(token_losses(on, batches).mean()), abs=1e-4
        )
        others = [each for each in domains.files if each != file]
        less = compose_experts(
            domains.base, others, background=composed.mixture.background_statistics
        )
        assert found.removed[number] == pytest.approx(
            float(token_losses(less, batches).mean()), abs=1e-4
        )
        assert found.removed[number] > found.loss + 0.3
    assert found.oracle < found.loss < min(found.alone)


def test_worth_without_none(domains):
    mixture = mixture_of(domains, background=None, none=False, top_k=1)
    assert mixture.background_statistics is None
    classes = [load_expert(file).statistics for file in domains.files]
    found = composed_worth(mixture, classes, {"text": domain(0)})["text"]
    assert found.names == ["domain0", "domain1"]
    assert found.removed == pytest.approx(found.alone[::-1], abs=1e-4)
    assert found.loss < loss(domains.base, 0)


def test_worth_that_is_refused(domains, composed):
    refuses(
        ValueError,
        "at least two experts",
        composed_worth,
        composed.mixture,
        composed.classes[:2],
        {"text": domain(0)},
    )
    refuses(ValueError, "at least two experts", composed_worth, domains.base, [], {})
    unlabelled = {"text": [{"input_ids": torch.ones(1, 4).long()}]}
    refuses(
        ValueError,
        "batches must hold labels; got input_ids",
        composed_worth,
        composed.mixture,
        composed.classes,
        unlabelled,
    )
    refuses(ValueError, "batches must hold tokens to predict", token_losses, domains.base, [])


def test_several_experts_in_one_dense_network(domains):
    base = copy.deepcopy(domains.base)
    base.generation_config.max_new_tokens = 7
    merged = merge_expert(base, domains.files, weight=0.5)
    assert merged.generation_config.max_new_tokens == 7
    assert merged.config.intermediate_size == 48 + 2 * M
    ids = domain(0)[0]["input_ids"]
    apart = [start_expert(base, expert=file).eval() for file in domains.files]
    x = torch.randn(5, 32)
    for layer in range(2):
        expected = sum(model.model.layers[layer].mlp(x) for model in apart) / 2
        torch.testing.assert_close(
            merged.model.layers[layer].mlp(x), expected, rtol=1e-5, atol=1e-5
        )
    assert merged(input_ids=ids).logits.isfinite().all()
    refuses(ValueError, "expert must be at least one; got an empty list", merge_expert, base, [])
    for weight in (math.nan, "a", True):
        refuses(
            ValueError,
            "weight must be a finite number",
            merge_expert,
            base,
            domains.files,
            weight=weight,
        )


def test_biases_of_several_experts():
    base = dense_model("gpt2")
    expert = start_expert(base, 4)
    merged = merge_expert(base, [made_expert(expert, "a"), made_expert(expert, "b")])
    assert merged.transformer.h[0].mlp.c_fc.bias.shape == (
        base.transformer.h[0].mlp.c_fc.bias.shape[0] + 8,
    )


def test_texts_refine_the_router(domains, tmp_path):
    texts = {f"domain{number}": domain(number, seed=30) for number in (0, 1)}
    plain = mixture_of(domains)
    refined = mixture_of(domains, texts=texts)
    assert [len(each.statistics["model.layers.0.mlp.vectors"]) for each in refined.composed_of] == [
        32,
        32,
    ]
    assert all(loss(refined, number) < loss(plain, number) + 0.05 for number in (0, 1))
    routers = {name: layer.router.weight for name, layer in neuron_modules(plain).items()}
    assert not any(
        torch.equal(layer.router.weight, routers[n]) for n, layer in neuron_modules(refined).items()
    )
    again = compose_experts(
        domains.base, refined.composed_of, background=plain.background_statistics
    )
    assert not differing(refined, again)
    bare = load_expert(domains.files[0])
    bare.statistics.clear()
    compose_experts(
        domains.base, [bare], background=domains.background, texts={"domain0": texts["domain0"]}
    )
    refuses(
        ValueError,
        "texts must be by names of experts, domain0, domain1; got 'law'",
        mixture_of,
        domains,
        texts={"law": []},
    )


NETWORK = ["gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of rank 4, trained on texts of domain 2: its folder and the model that it was
    merged into."""
    peft = pytest.importorskip("peft")
    folder, base = tmp_path_factory.mktemp("adapter") / "law", language_model()
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=NETWORK))
    fit(model, lessons(2, 10))
    model.save_pretrained(folder)
    return SimpleNamespace(folder=folder, base=base, merged=model.merge_and_unload().eval())


def texts(count=5):
    return [each for seed in range(count) for each in domain(2, seed=40 + seed)]


def test_neurons_keep_the_adapters_gain(adapter):
    assert is_adapter(adapter.folder)
    # 4 (32 + 48) numbers for each of three matrices, beside 3 x 32 of a neuron.
    assert check_adapter(adapter.base, adapter.folder) == 10
    expert = fit_adapter(
        adapter.base, adapter.merged, texts(), "law", neurons=20, steps=100, tokenizer=tokenizer()
    )
    facts = expert.facts["training"]
    assert expert.name == "law"
    assert facts["base"] - facts["adapter"] > 1.0
    assert facts["kept"] == pytest.approx(
        (facts["base"] - facts["expert"]) / (facts["base"] - facts["adapter"])
    )
    own = loss(start_expert(adapter.base, expert=expert), 2)
    assert (
        own < loss(adapter.base, 2) - 0.8 * (loss(adapter.base, 2) - loss(adapter.merged, 2)) + 0.05
    )
    mixture = compose_experts(adapter.base, [expert], background=domain(1), tokenizer=tokenizer())
    assert loss(mixture, 2) < own + 0.2


def test_neurons_for_an_adapter_of_attention(tmp_path):
    peft = pytest.importorskip("peft")
    base = language_model()
    torch.manual_seed(0)
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"])
    )
    fit(model, lessons(2, 10))
    model.save_pretrained(tmp_path)
    assert (
        check_adapter(base, tmp_path) == 8
    )  # 4 (32 + 32) numbers for each of three matrices, beside 3 x 32
    merged = model.merge_and_unload().eval()
    facts = fit_adapter(base, merged, texts(), "law", neurons=20, steps=100).facts["training"]
    assert facts["base"] - facts["adapter"] > 0.5
    assert facts["kept"] >= 0.8


def test_held_out_texts_are_not_fitted(adapter, monkeypatch):
    given = texts(5)[:5]  # the first is held out
    read = []
    own = adapter.merged.forward
    monkeypatch.setattr(
        adapter.merged, "forward", lambda **named: read.append(named["input_ids"]) or own(**named)
    )
    refuses(
        ValueError,
        "must keep 80%",
        fit_adapter,
        adapter.base,
        adapter.merged,
        given,
        "law",
        neurons=1,
        steps=4,
    )
    assert [sum(torch.equal(batch["input_ids"], ids) for ids in read) for batch in given] == [
        1,
        1,
        1,
        1,
        1,
    ]


def test_fits_that_are_refused(adapter):
    base, merged = adapter.base, adapter.merged
    message = "must have the name of a file"
    refuses(ValueError, message, fit_adapter, base, None, texts(), "a/b", neurons=1)
    for message, model, given in (
        (r"'law' must keep 80% of its gain as 1 neurons; it keeps -?\d+%: base", merged, texts()),
        ("'law' must be better than the base on its texts", copy.deepcopy(base), texts()),
        ("batches must be at least two, of which one is held out; got 1", merged, texts()[:1]),
    ):
        fit_one = partial(fit_adapter, base, model, given, "law", neurons=1, steps=2)
        refuses(ValueError, message, fit_one)


def saved(base, folder, **config):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 2, **config})).save_pretrained(
        folder
    )
    return folder


def test_adapters_that_are_refused(adapter, tmp_path):
    small = saved(adapter.base, tmp_path / "small", r=1, target_modules=["layers.0.mlp.up_proj"])
    assert (
        check_adapter(adapter.base, small) == 1
    )  # 32 + 48 numbers, fewer than half a neuron of two layers
    refuses(
        ValueError,
        r"adapts model\.layers\.0\..*, which the base does not have",
        check_adapter,
        dense_model("gpt2"),
        adapter.folder,
    )
    refuses(
        ValueError,
        "must be a folder of PEFT's with safetensors",
        check_adapter,
        adapter.base,
        tmp_path,
    )
    trained = saved(
        adapter.base, tmp_path / "more", target_modules=NETWORK, modules_to_save=["lm_head"]
    )
    refuses(
        ValueError,
        r"must be a plain LoRA; .* is LORA and holds base_model\.model\.lm_head",
        check_adapter,
        adapter.base,
        trained,
    )
    other = saved(adapter.base, tmp_path / "other", target_modules=NETWORK)
    facts = other / "adapter_config.json"
    write_json(facts, {**read_json(facts), "peft_type": "IA3"})
    refuses(ValueError, r"must be a plain LoRA; .* is IA3", check_adapter, adapter.base, other)
    file = other / "adapter_model.safetensors"
    save_file(load_file(file), file)
    file.write_bytes(file.read_bytes()[:-9])
    refuses(ValueError, "whole safetensors file", check_adapter, adapter.base, other)


def test_other_bases_are_refused(domains):
    other = copy.deepcopy(domains.base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for refused in (
        lambda: start_expert(other, expert=domains.files[0]),
        lambda: merge_expert(other, domains.files[0]),
        lambda: compose_experts(other, domains.files, background=domains.background),
        lambda: merge_expert(copy.deepcopy(domains.base).to(torch.bfloat16), domains.files[0]),
    ):
        refuses(ValueError, r"'domain0' must be of this base.*LlamaForCausalLM", refused)
    refuses(
        ValueError, "MPOE model already", merge_expert, start_expert(domains.base), domains.files[0]
    )


def test_compositions_that_are_refused(domains, tmp_path):
    def compose(experts, **options):
        given = {"background": domains.background, **options}
        return compose_experts(domains.base, experts, **given)

    files = domains.files
    repeated = "experts must differ; 'domain0' is there twice"
    refuses(ValueError, repeated, compose, [*files, files[0]])
    for experts in ([], "ab", None):
        refuses(ValueError, "experts must be a list", compose, experts)
    save_expert(stirred(start_expert(domains.base, 4)), tmp_path / "bare.expert")
    bare = [*files, tmp_path / "bare.expert"]
    refuses(ValueError, "'bare' must hold statistics", compose, bare)
    refuses(TypeError, "tokenizer must be", compose, files, tokenizer=3)
    for message, options in {
        "one tokenizer; the vocabularies of the tokenizer and expert 'domain0'": {
            "tokenizer": tokenizer(7)
        },
        "background must be batches or statistics, or tokenizer": {"background": None},
        "top_k must be at most": {"top_k": 4},
        "background must hold mean": {"background": {"x": torch.ones(2)}},
    }.items():
        refuses(ValueError, message, compose, files, **options)


def test_saves_that_are_refused(tmp_path):
    base = dense_model("llama")
    model, file = start_expert(base, 8), tmp_path / "an.expert"
    mixture = convert_to_mpoe(base, MPOEConfig(shape="neurons", neurons=4))
    latent = convert_to_mpoe(
        base, MPOEConfig(moe_type="none", shape="neurons", neurons=4, latent=4)
    )
    for odd in (base, mixture, latent, convert_to_mpoe(base)):
        refuses(TypeError, "model must have one expert", save_expert, odd, file)
    refuses(TypeError, "path must be the path of a file", save_expert, model, 3)
    for path in (tmp_path, tmp_path / "absent/an.expert"):
        message = "path must be of a file in a folder that is there"
        refuses(ValueError, message, save_expert, model, path)
    for message, options in (
        ("training must hold what JSON can", {"training": {"x": base}}),
        ("training must hold what JSON can", {"training": {"loss": float("nan")}}),
        ("training must be a mapping of facts; got int", {"training": 3}),
        ("statistics must be a mapping", {"statistics": [1]}),
        ("tokenizer must be a tokenizer", {"tokenizer": "a"}),
    ):
        refuses(TypeError, message, save_expert, model, file, **options)
    spoiled = dict(list(model.named_parameters())[:6])
    for parameter in spoiled.values():
        parameter.data.view(-1)[0] = float("nan")
    message = f"finite weights; NaN or Inf in {', '.join(list(spoiled)[:5])} and 1 more"
    refuses(ValueError, message, save_expert, model, file)
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_refused():
    base = dense_model("llama")
    refuses(TypeError, "model must be a model with an expert", collect_statistics, base, [])
    refuses(ValueError, "shape 'neurons'", collect_statistics, convert_to_mpoe(base), [])
    model = start_expert(base, 8)
    refuses(ValueError, "rank must be at least 0; got -1", collect_statistics, model, [], rank=-1)
    refuses(
        TypeError,
        "rank must be an integer or None; got bool",
        collect_statistics,
        model,
        [],
        rank=True,
    )
    refuses(ValueError, "batches must hold tokens", collect_statistics, model, [])
    for odd in (3, torch.ones(1, 4), {"input_ids": [1, 2]}):
        refuses(
            TypeError,
            "batches must hold tensors by argument of the model",
            collect_statistics,
            model,
            [odd],
        )
    embeds = torch.full((1, 4, 24), float("nan"))
    refuses(ValueError, "finite inputs", collect_statistics, model, [{"inputs_embeds": embeds}])
