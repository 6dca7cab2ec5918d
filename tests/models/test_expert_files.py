"""Experts as files: trained beside a frozen base, saved, merged, composed with routers from their own statistics."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from mpoe import (
    collect_statistics,
    compose_experts,
    convert_to_mpoe,
    load_expert,
    load_mpoe,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.config import MPOEConfig
from mpoe.models.expert_files import base_identity, expected_weights, write_expert
from mpoe.models.expert_mixture import documentation_batches
from mpoe.models.expert_router import _second_moment
from mpoe.models.neurons import neuron_modules

from .small_models import FAMILIES, batch, dense_model, result, valid_rows
from .tiny_families import first_result, text_rows, tiny_batch, tiny_model

VOCABULARY, DOMAIN = 60, 15  # tokens; tokens of each domain, from its number times this on
M = 32


def tokenizer(words: int = VOCABULARY) -> Any:
    def encode(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % VOCABULARY for letter in text]}

    encode.get_vocab = lambda: {f"w{i}": i for i in range(words)}
    return encode


def stirred(model: nn.Module, seed: int = 0) -> Any:
    """A model whose expert contributes."""
    torch.manual_seed(seed)
    for layer in neuron_modules(model).values():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def domain(number: int, seed: int = 0, rows: int = 32) -> list[dict[str, torch.Tensor]]:
    """Texts of one domain: every token is followed by a fixed one of the same domain, or, one in five, by any."""
    generator = torch.Generator().manual_seed(100 * number + seed)
    follower = torch.randperm(DOMAIN, generator=torch.Generator().manual_seed(number))
    ids = torch.randint(DOMAIN, (rows, 16), generator=generator)
    for place in range(1, 16):
        follows = torch.rand(rows, generator=generator) < 0.8
        ids[:, place] = torch.where(follows, follower[ids[:, place - 1]], ids[:, place])
    ids = ids + number * DOMAIN
    return [{"input_ids": part, "labels": part} for part in ids.split(16)]


def language_model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=32, pad_token_id=0, **sizes)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


@torch.no_grad()
def loss(model: Any, number: int) -> float:
    return sum(float(model.eval()(**each).loss) for each in domain(number, seed=9)) / 2


def trained(base: Any, number: int) -> Any:
    torch.manual_seed(number)
    model = start_expert(base, M).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(60):
        for each in domain(number, seed=step % 8):
            model(**each).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base, two experts trained on texts of disjoint vocabularies, their files, and losses with the right one."""
    folder, base = tmp_path_factory.mktemp("experts"), language_model()
    files, own = [], []
    for number in (0, 1):
        model = trained(base, number)
        files.append(folder / f"domain{number}.expert")
        statistics = collect_statistics(model, domain(number, seed=20))
        save_expert(model, files[-1], statistics=statistics, tokenizer=tokenizer(), training={"steps": 120})
        own.append(loss(model, number))
    return SimpleNamespace(base=base, files=files, own=own, background=domain(2))


# ------------------------------------------------------------------ training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trainer_leaves_the_base_as_it_is(family: str, tmp_path: Path) -> None:
    base = dense_model(family)
    model = start_expert(base, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {name: value[0] for name, value in batch(family).items()}
    options = {"max_steps": 4, "learning_rate": 0.01, "weight_decay": 0.5, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, save_strategy="no", **options)
    Trainer(model, arguments, train_dataset=[inputs] * 8).train()
    after, own = model.state_dict(), {name for name, p in model.named_parameters() if p.requires_grad}
    assert own == {name for name in before if ".experts." in name}
    assert all(torch.equal(after[name], value) for name, value in before.items() if name not in own)
    assert not all(torch.equal(after[name], before[name]) for name in own)
    assert base_identity(model) == base_identity(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_start_changes_no_bit(family: str) -> None:
    base, inputs = dense_model(family), batch(family)
    with torch.no_grad():
        assert torch.equal(result(start_expert(base, 8)(**inputs)), result(base(**inputs)))


def test_start_in_place() -> None:
    base = dense_model("llama")
    assert start_expert(base, 8, inplace=True) is base


# ------------------------------------------------------------------ files


def test_round_trip(tmp_path: Path) -> None:
    base = dense_model("gpt2")
    model = stirred(start_expert(base, M))
    statistics = collect_statistics(model, [batch("gpt2")])
    saved = save_expert(model, tmp_path / "law.expert", statistics=statistics, training={"data": "laws", "steps": 3})
    assert [file.name for file in tmp_path.iterdir()] == ["law.expert"]
    loaded = load_expert(str(tmp_path / "law.expert"))
    assert loaded.facts == saved.facts
    assert loaded.facts["training"] == {"data": "laws", "steps": 3}
    assert (loaded.name, loaded.neurons) == ("law", M)
    for kind in ("weights", "statistics"):
        assert getattr(loaded, kind).keys() == getattr(saved, kind).keys()
        assert all(torch.equal(value, getattr(saved, kind)[name]) for name, value in getattr(loaded, kind).items())
    again = start_expert(base, expert=tmp_path / "law.expert")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("family", ["t5", "t5_gated", "gpt2", "llama", "bert", "bert_classifier"])
def test_merged_computes_the_same(family: str, tmp_path: Path) -> None:
    base = dense_model(family).double()
    model = stirred(start_expert(base, 5))
    save_expert(model, tmp_path / "an.expert")
    merged = merge_expert(base, tmp_path / "an.expert")
    inputs = batch(family)
    with torch.no_grad():
        expected, found = (valid_rows(family, result(each.eval()(**inputs)), inputs) for each in (model, merged))
        assert not torch.allclose(expected, valid_rows(family, result(base(**inputs)), inputs))
    assert type(merged) is type(base)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("model_type", "name"), [("phi3", "Phi3ForCausalLM"), ("gpt_neox", "GPTNeoXForCausalLM"), ("vit", "ViTModel")]
)
def test_other_structures_merge(model_type: str, name: str, tmp_path: Path) -> None:
    base = tiny_model(model_type, name)
    model = stirred(start_expert(base, 5))
    merged = merge_expert(base, save_expert(model, tmp_path / "an.expert"))
    inputs = tiny_batch(base, model_type)
    with torch.no_grad():
        expected, found = (text_rows(first_result(each.eval()(**inputs)), inputs) for each in (model, merged))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------ statistics


def test_statistics_of_full_rank_are_exact_and_without_padding() -> None:
    model = start_expert(dense_model("llama"), 8)
    inputs = batch("llama")
    seen: dict[str, torch.Tensor] = {}
    name, layer = next(iter(neuron_modules(model).items()))
    hook = layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    statistics = collect_statistics(model.train(), [inputs], rank=24)
    hook.remove()
    assert model.training
    x = seen["x"][inputs["attention_mask"].bool()].double()
    torch.testing.assert_close(statistics[f"{name}.mean"].double(), x.mean(0), rtol=1e-5, atol=1e-5)
    moment = _second_moment(statistics, name)
    torch.testing.assert_close(moment, x.T @ x / len(x), rtol=2e-3, atol=2e-3 * float(moment.abs().max()))
    sketch = _second_moment(collect_statistics(model, [inputs], rank=3), name)
    torch.testing.assert_close(sketch.diagonal(), moment.diagonal(), rtol=2e-3, atol=2e-3)


def test_statistics_are_small(domains: SimpleNamespace) -> None:
    expert = load_expert(domains.files[0])
    of = {kind: sum(value.nbytes for value in getattr(expert, kind).values()) for kind in ("weights", "statistics")}
    assert 0.05 < of["statistics"] / of["weights"] <= 0.1


# ------------------------------------------------------------------ composition


def test_tokens_find_their_expert(domains: SimpleNamespace, tmp_path: Path) -> None:
    mixture = compose_experts(domains.base, domains.files, background=domains.background, tokenizer=tokenizer())
    for number, own in enumerate(domains.own):
        gain = loss(domains.base, number) - own
        assert gain > 1.5
        assert loss(mixture, number) < own + 0.1 * gain
    always_on = start_expert(domains.base, expert=domains.files[0])
    change, change_always_on = (abs(loss(each, 2) - loss(domains.base, 2)) for each in (mixture, always_on))
    assert change < 0.5 * change_always_on
    assert mixture.config.mpoe_experts == ["domain0", "domain1", "none"]
    mixture.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path).eval()
    ids = domain(0)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, mixture(input_ids=ids).logits)
    assert again.config.mpoe_experts == mixture.config.mpoe_experts


def test_none_adds_nothing(domains: SimpleNamespace) -> None:
    mixture = compose_experts(domains.base, domains.files[:1], background=domains.background, top_k=1)
    for layer in neuron_modules(mixture).values():
        layer.router.weight.data.zero_()  # all logits are 0; the first expert would win
        layer.experts.down.data[0].zero_()
    ids = domain(3)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(mixture(input_ids=ids).logits, domains.base(input_ids=ids).logits)


def test_composition_depends_on_its_arguments_alone(domains: SimpleNamespace, tmp_path: Path) -> None:
    wide = save_third(domains, tmp_path / "wide.expert", M + 4)
    first = compose_experts(domains.base, domains.files, background=domains.background)
    three = compose_experts(domains.base, [*domains.files, wide], background=first.background_statistics)
    torch.manual_seed(5)
    again = compose_experts(domains.base, domains.files, background=three.background_statistics)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    for layer in neuron_modules(three).values():
        assert layer.experts.neurons == M + 4
        assert not layer.experts.up[:2, M:].any()
        assert not layer.experts.up[3].any()


def save_third(domains: SimpleNamespace, file: Path, neurons: int) -> Path:
    model = stirred(start_expert(domains.base, neurons), 7)
    save_expert(model, file, statistics=collect_statistics(model, domain(3)))
    return file


def test_without_none(domains: SimpleNamespace) -> None:
    mixture = compose_experts(domains.base, domains.files, none=False, top_k=1)
    assert mixture.mpoe_config.num_experts == 2
    assert mixture.background_statistics is None
    assert loss(mixture, 0) < loss(domains.base, 0)


def test_the_packaged_text_is_the_background(domains: SimpleNamespace) -> None:
    mixture = compose_experts(domains.base, domains.files, tokenizer=tokenizer())
    batches = documentation_batches(domains.base, tokenizer())
    assert sum(each["input_ids"].numel() for each in batches) == 128 * 32  # its positions
    own = collect_statistics(start_expert(domains.base, 1), batches, rank=32)
    assert all(torch.equal(value, mixture.background_statistics[name]) for name, value in own.items())
    t5 = documentation_batches(dense_model("t5"), tokenizer())[0]
    assert t5["labels"] is t5["input_ids"]


# ------------------------------------------------------------------ refusals


def test_other_bases_are_refused(domains: SimpleNamespace) -> None:
    other = copy.deepcopy(domains.base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for refused in (
        lambda: start_expert(other, expert=domains.files[0]),
        lambda: merge_expert(other, domains.files[0]),
        lambda: compose_experts(other, domains.files, background=domains.background),
        lambda: merge_expert(copy.deepcopy(domains.base).to(torch.bfloat16), domains.files[0]),
    ):
        with pytest.raises(ValueError, match=r"'domain0' must be of this base.*LlamaForCausalLM"):
            refused()
    with pytest.raises(ValueError, match="MPOE model already"):
        merge_expert(start_expert(domains.base), domains.files[0])


def test_compositions_that_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    def compose(experts: Any, **options: Any) -> Any:
        return compose_experts(domains.base, experts, **{"background": domains.background, **options})

    with pytest.raises(ValueError, match="experts must differ; 'domain0' is there twice"):
        compose([domains.files[0], domains.files[1], domains.files[0]])
    for experts in ([], "ab", None):
        with pytest.raises(ValueError, match="experts must be a list"):
            compose(experts)
    with pytest.raises(ValueError, match="one tokenizer; the vocabularies of the tokenizer and expert 'domain0'"):
        compose(domains.files, tokenizer=tokenizer(7))
    with pytest.raises(TypeError, match="tokenizer must be"):
        compose(domains.files, tokenizer=3)
    save_expert(stirred(start_expert(domains.base, 4)), tmp_path / "bare.expert")
    with pytest.raises(ValueError, match="'bare' must hold statistics"):
        compose([*domains.files, tmp_path / "bare.expert"])
    with pytest.raises(ValueError, match="background must be batches or statistics, or tokenizer"):
        compose(domains.files, background=None)
    with pytest.raises(ValueError, match="top_k must be at most"):
        compose(domains.files, top_k=4)
    with pytest.raises(ValueError, match="background must hold mean"):
        compose(domains.files, background={"x": torch.ones(2)})
    with pytest.raises(ValueError, match="it does not make the model's tokens"):
        documentation_batches(dense_model("gpt2"), lambda text: {"input_ids": [VOCABULARY] * 100})


def test_damaged_files_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    file, whole = tmp_path / "a.expert", domains.files[0].read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_expert(file)
    file.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(ValueError, match="damaged"):
        load_expert(file)
    file.write_bytes(whole.replace(b"LlamaForCausalLM", b"LlamaForCausalLN"))
    with pytest.raises(ValueError, match="damaged"):
        load_expert(file)
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="another safetensors file"):
        load_expert(file)
    with pytest.raises(ValueError, match="is no file"):
        load_expert(tmp_path)
    with pytest.raises(TypeError, match="path must be an expert's file"):
        load_expert(3)
    expert = load_expert(domains.files[0])
    expert.facts["format"] = 2
    write_expert(expert, file)
    with pytest.raises(ValueError, match="must be of format 1; got 2"):
        load_expert(file)
    with safe_open(domains.files[0], framework="pt") as opened:
        assert json.loads(opened.metadata()["expert"])["neurons"] == M


def test_contents_that_do_not_fit_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    expert, file = load_expert(domains.files[0]), tmp_path / "a.expert"
    name = next(iter(expert.weights))
    expert.weights[name] = expert.weights[name] * float("nan")
    write_expert(expert, file)
    with pytest.raises(ValueError, match="must have finite weights; NaN or Inf in"):
        load_expert(file)
    expert.weights[name] = torch.ones(3)
    with pytest.raises(ValueError, match=r"must have .* \(32, 32\); it has \(3,\)"):
        start_expert(domains.base, expert=expert)
    expert = load_expert(domains.files[0])
    mean = next(name for name in expert.statistics if name.endswith("mean"))
    for odd in (torch.full_like(expert.statistics[mean], float("nan")), torch.ones(3)):
        expert.statistics[mean] = odd
        with pytest.raises(ValueError, match="the statistics of expert 'domain0' must hold finite numbers"):
            compose_experts(domains.base, [expert], background=domains.background)


def test_saves_that_are_refused(tmp_path: Path) -> None:
    base = dense_model("llama")
    model, file = start_expert(base, 8), tmp_path / "an.expert"
    mixture = convert_to_mpoe(base, MPOEConfig(shape="neurons", neurons=4))
    latent = convert_to_mpoe(base, MPOEConfig(moe_type="none", shape="neurons", neurons=4, latent=4))
    for odd in (base, mixture, latent, convert_to_mpoe(base)):
        with pytest.raises(TypeError, match="model must have one expert"):
            save_expert(odd, file)
    with pytest.raises(TypeError, match="path must be the path of a file"):
        save_expert(model, 3)
    for path in (tmp_path, tmp_path / "absent" / "an.expert"):
        with pytest.raises(ValueError, match="path must be of a file in a folder that is there"):
            save_expert(model, path)
    with pytest.raises(TypeError, match="training must hold what JSON can"):
        save_expert(model, file, training={"x": base})
    with pytest.raises(TypeError, match="training must hold what JSON can"):
        save_expert(model, file, training={"loss": float("nan")})
    with pytest.raises(TypeError, match="training must be a mapping of facts; got int"):
        save_expert(model, file, training=3)
    with pytest.raises(TypeError, match="statistics must be a mapping"):
        save_expert(model, file, statistics=[1])
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer"):
        save_expert(model, file, tokenizer="a")
    next(iter(neuron_modules(model).values())).experts.up.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights"):
        save_expert(model, file)
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_refused() -> None:
    base = dense_model("llama")
    with pytest.raises(TypeError, match="model must have an expert"):
        collect_statistics(base, [])
    with pytest.raises(ValueError, match="shape 'neurons'"):
        collect_statistics(convert_to_mpoe(base), [])
    model = start_expert(base, 8)
    for rank in (-1, 25, True, 1.5):
        with pytest.raises(ValueError, match="rank must be an integer from 0 to the model size 24"):
            collect_statistics(model, [], rank=rank)
    with pytest.raises(ValueError, match="batches must hold tokens"):
        collect_statistics(model, [])
    embeds = torch.full((1, 4, 24), float("nan"))
    with pytest.raises(ValueError, match="finite inputs"):
        collect_statistics(model, [{"inputs_embeds": embeds}])


def test_networks_without_a_module_are_refused() -> None:
    with pytest.raises(ValueError, match="shape 'neurons' needs"):
        start_expert(tiny_model("opt", "OPTForCausalLM"))


def test_shapes_are_those_of_the_model() -> None:
    model = start_expert(dense_model("gpt2"), 8)
    assert expected_weights(model, 3)["transformer.h.0.mlp.up"] == (3, 24)
    assert expected_weights(model, 3)["transformer.h.0.mlp.bias"] == (3,)
