"""Experts as files: trained beside a frozen base, saved, merged, composed with routers from their
own statistics."""

import dataclasses
import os

import pytest
import torch
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from mpoe import (
    collect_statistics,
    compose_experts,
    load_expert,
    load_mpoe,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.models import push_expert
from mpoe.models.background import background_batches, documentation_batches
from mpoe.models.composition import _second_moment, check_statistics
from mpoe.models.expert_files import base_identity
from mpoe.models.walk import neuron_modules
from tests.assertions import differing, refuses

from .tiny_models import (
    FAMILIES,
    VOCABULARY,
    M,
    batch,
    dense_model,
    domain,
    loss,
    mixture_of,
    result,
    shorten_documentation,
    stirred,
    text_rows,
    tiny_batch,
    tiny_model,
    tokenizer,
)

# ------------------------------------------------------------------ training


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_trainer_leaves_the_base_as_it_is(family, tmp_path):
    base = dense_model(family)
    model = start_expert(base, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = {name: value[0] for name, value in batch(family).items()}
    options = {
        "max_steps": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.5,
        "report_to": [],
        "use_cpu": True,
    }
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, save_strategy="no", **options
    )
    Trainer(model, arguments, train_dataset=[inputs] * 8).train()
    after, own = (
        model.state_dict(),
        {name for name, p in model.named_parameters() if p.requires_grad},
    )
    assert own == {name for name in before if ".experts." in name}
    changed = set(differing(before, after))
    assert changed
    assert changed <= own
    assert base_identity(model) == base_identity(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_start_changes_no_bit(family):
    base, inputs = dense_model(family), batch(family)
    with torch.no_grad():
        assert torch.equal(result(start_expert(base, 8)(**inputs)), result(base(**inputs)))
    assert start_expert(base, 8, inplace=True) is base


# ------------------------------------------------------------------ files


def test_round_trip(tmp_path):
    base = dense_model("gpt2")
    base.config._name_or_path = str(tmp_path)  # is nobody else's business
    model = stirred(start_expert(base, M))
    refuses(TypeError, "batches must be an iterable .*; got int 7", collect_statistics, model, 7)
    statistics = collect_statistics(model, [batch("gpt2")])
    saved = save_expert(
        model, tmp_path / "law.expert", statistics=statistics, training={"data": "laws", "steps": 3}
    )
    assert os.listdir(tmp_path) == ["law.expert"]
    loaded = load_expert(str(tmp_path / "law.expert"))
    assert loaded.facts == saved.facts
    assert loaded.facts["training"] == {"data": "laws", "steps": 3}
    model.save_pretrained(tmp_path)
    assert (loaded.facts["base_name"], load_mpoe(tmp_path).config.mpoe_base) == ("", "")
    assert (loaded.name, loaded.neurons) == ("law", M)
    for kind in ("weights", "statistics"):
        assert getattr(loaded, kind).keys() == getattr(saved, kind).keys()
        assert not differing(getattr(loaded, kind), getattr(saved, kind))
    again = start_expert(
        base, expert=(tmp_path / "law.expert").rename(tmp_path / "rulings.v2.expert")
    )
    assert load_expert(tmp_path / "rulings.v2.expert").name == "rulings.v2"
    assert not differing(model, again)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


STRUCTURES = [
    *(FAMILIES[family] for family in ("t5", "t5_gated", "gpt2", "llama", "bert_classifier")),
    *(
        (model_type, name, {})
        for model_type, name in (
            ("bert", "BertModel"),
            ("phi3", "Phi3ForCausalLM"),
            ("gpt_neox", "GPTNeoXForCausalLM"),
            ("vit", "ViTModel"),
        )
    ),
]


@pytest.mark.parametrize("model_type, name, changes", STRUCTURES)
def test_merged_computes_the_same(model_type, name, changes, tmp_path):
    base = tiny_model(model_type, name, **changes).double()
    model = stirred(start_expert(base, 24))
    save_expert(model, tmp_path / "an.expert")
    merged = merge_expert(base, tmp_path / "an.expert")
    inputs = tiny_batch(base, model_type)
    if model_type == "vit":
        inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        dense, expected, found = (
            text_rows(result(each.eval()(**inputs)), inputs) for each in (base, model, merged)
        )
    assert not torch.allclose(expected, dense)
    assert type(merged) is type(base)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-12


# ------------------------------------------------------------------ statistics


def test_statistics_of_full_rank_are_exact_and_without_padding():
    model = start_expert(dense_model("llama"), 8)
    inputs = batch("llama")
    seen = {}
    name, layer = next(iter(neuron_modules(model).items()))
    hook = layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    statistics = collect_statistics(model.train(), [inputs], rank=24)
    hook.remove()
    assert model.training
    x = seen["x"][inputs["attention_mask"].bool()].double()
    assert_close(statistics[f"{name}.mean"].double(), x.mean(0), rtol=1e-5, atol=1e-5)
    moment = _second_moment(statistics, name)
    assert_close(moment, x.T @ x / len(x), rtol=2e-3, atol=2e-3 * float(moment.abs().max()))
    sketch = _second_moment(collect_statistics(model, [inputs], rank=3), name)
    assert_close(sketch.diagonal(), moment.diagonal(), rtol=2e-3, atol=2e-3)
    one = {f"{name}.{part}": statistics[f"{name}.{part}"] for part in ("mean", "vectors", "values")}
    refuses(
        ValueError,
        rf"the law must hold .*see {name}\.rest",
        check_statistics,
        one,
        {name: x.shape[1]},
        "the law",
    )


@pytest.mark.parametrize("neurons", [40, 46])
def test_statistics_are_a_tenth_and_one_vector_more_would_be_too_much(neurons):
    model = start_expert(dense_model("llama"), neurons)
    weights = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    statistics = collect_statistics(model, [batch("llama")])
    own = sum(value.nbytes for value in statistics.values())
    one = next(value for name, value in statistics.items() if name.endswith(".vectors"))
    assert 0 < len(one) < 24
    vector = len(neuron_modules(model)) * (one[0].nbytes + 4)
    assert own <= 0.1 * weights < own + vector


# ------------------------------------------------------------------ composition


def test_tokens_find_their_expert(domains, tmp_path):
    mixture = mixture_of(domains, tokenizer=tokenizer())
    for number, own in enumerate(domains.own):
        gain = loss(domains.base, number) - own
        assert gain > 1.5
        assert loss(mixture, number) < own + 0.1 * gain
    always_on = start_expert(domains.base, expert=domains.files[0])
    change, change_always_on = (
        abs(loss(each, 2) - loss(domains.base, 2)) for each in (mixture, always_on)
    )
    assert change < 0.5 * change_always_on
    assert mixture.config.mpoe_experts == ["domain0", "domain1", "none"]
    mixture.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path).eval()
    ids = domain(0)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, mixture(input_ids=ids).logits)
    assert again.config.mpoe_experts == mixture.config.mpoe_experts


def test_none_adds_nothing(domains):
    mixture = compose_experts(
        domains.base, domains.files[:1], background=domains.background, top_k=1
    )
    for layer in neuron_modules(mixture).values():
        layer.router.weight.data.zero_()  # all logits are 0; the first expert would win
        layer.experts.down.data[0].zero_()
    ids = domain(3)[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(mixture(input_ids=ids).logits, domains.base(input_ids=ids).logits)


def test_composition_depends_on_its_arguments_alone(domains, tmp_path):
    wide, model = tmp_path / "wide.expert", stirred(start_expert(domains.base, M + 4))
    save_expert(model, wide, statistics=collect_statistics(model, domain(3)))
    first = mixture_of(domains)
    three = compose_experts(
        domains.base, [*domains.files, wide], background=first.background_statistics
    )
    torch.manual_seed(5)
    again = mixture_of(domains, background=three.background_statistics)
    assert not differing(first, again)
    for layer in neuron_modules(three).values():
        assert layer.experts.neurons == M + 4
        assert not layer.experts.up[:2, M:].any()
        assert not layer.experts.up[3].any()


@torch.no_grad()
def test_gates_sum_to_one(domains):
    """Of two experts that hardly differ, a mixture computes what one of them does alone."""
    expert = load_expert(domains.files[0])
    weights = {name: value * (1 + 1e-6) for name, value in expert.weights.items()}
    twin = dataclasses.replace(expert, facts={**expert.facts, "name": "twin"}, weights=weights)
    mixture = compose_experts(domains.base, [expert, twin], none=False, top_k=2)
    ids = domain(0)[0]["input_ids"]
    want = start_expert(domains.base, expert=expert).eval()(input_ids=ids).logits
    assert_close(mixture(input_ids=ids).logits, want, rtol=1e-3, atol=1e-3)


def test_an_encoder_decoders_background_is_the_packaged_text(monkeypatch):
    shorten_documentation(monkeypatch)
    base = dense_model("t5")
    batches = documentation_batches(base, tokenizer())
    assert batches[0]["labels"] is batches[0]["input_ids"]
    (part,) = background_batches(base, tokenizer())
    assert torch.equal(part[0]["input_ids"], batches[0]["input_ids"])
    encoder = documentation_batches(dense_model("bert"), tokenizer())[0]
    assert encoder.keys() == {"input_ids"}  # an encoder's head would have other labels
    refuses(
        ValueError,
        "it does not make the model's tokens",
        documentation_batches,
        base,
        lambda text, verbose: {"input_ids": [VOCABULARY] * 200},
    )
    refuses(
        ValueError,
        "must hold at least 128 tokens of the base; it has fewer",
        documentation_batches,
        base,
        lambda text, verbose: {"input_ids": [0] * 100},
    )


# ------------------------------------------------------------------ the hub


def test_a_folder_of_experts_is_one_commit(domains, hub):
    folder = domains.files[0].parent
    (folder / "notes.txt").write_text("not an expert")
    assert push_expert(folder, "experts", private=True, token="t") == "https://hub/commit/1"
    created = ("t", "experts", {"private": True, "exist_ok": True})
    assert hub.asked == [created, ("me/experts", "Experts domain0, domain1")]
    assert list(hub.files) == ["domain0.expert", "domain1.expert", "README.md"]
    card = hub.files["README.md"].decode()
    assert "library_name: mpoe" in card
    assert "| domain1.expert | LlamaForCausalLM | 32 |" in card
    hub.files.clear()
    push_expert(domains.files[1], "experts")
    assert list(hub.files) == ["domain1.expert", "README.md"]


def test_nothing_is_sent_of_a_damaged_file(domains, hub, tmp_path):
    (tmp_path / "a.expert").write_bytes(domains.files[0].read_bytes()[:-9])
    refuses(ValueError, "whole safetensors file", push_expert, tmp_path, "experts")
    (tmp_path / "a.expert").unlink()
    refuses(ValueError, r"holds no \*.expert", push_expert, tmp_path, "experts")
    assert not hub.asked
