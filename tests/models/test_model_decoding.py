"""What `generate` keeps while it runs: same tokens, within its bound, gone afterwards, nothing where it is useless."""

from __future__ import annotations

import contextlib
import copy
import logging

import pytest
import torch
from transformers.utils import logging as transformers_logging

from mpoe import load_mpoe
from mpoe.layers import MPOExperts, current_routing, routing_context
from mpoe.layers.expert_cache import PATIENCE, ExpertCache
from mpoe.models.classes import decoding_bytes, kept_while_generating
from tests.assertions import refuses
from tests.cases import pairwise

from .tiny_models import FAMILIES, MASK, batch, stirred

LOG = "mpoe.models.classes"
LIGHT = {"shape": "light", "light_p": 4, "num_experts": 2}


@pytest.fixture(autouse=True)
def _deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough layers for the size of the dense ones to leave room for a layer of two experts."""
    for family, layers in (("gpt2", "n_layer"), ("llama", "num_hidden_layers")):
        monkeypatch.setitem(FAMILIES[family][2], layers, 4)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full weights wherever they are allowed, and early: models this small never benefit from them."""
    monkeypatch.setattr("mpoe.layers.expert_cache.PATIENCE", 2)
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[ExpertCache]:
    """The caches that `generate` creates."""
    found: list[ExpertCache] = []

    def make(bound: int, layers: list[MPOExperts]) -> ExpertCache:
        found.append(ExpertCache(bound, layers))
        return found[-1]

    monkeypatch.setattr("mpoe.models.classes.ExpertCache", make)
    return found


def call(family: str, **options) -> dict:
    mask = MASK if family.startswith("t5") else MASK.flip(1)
    ids = batch(family, labels=False)["input_ids"]
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}


def experts(model) -> list[MPOExperts]:
    return [module for module in model.modules() if isinstance(module, MPOExperts)]


def built(cache: ExpertCache) -> int:
    return sum(kept.built for kept in cache.layers.values() if kept is not None)


def plain_tokens(model, **options) -> torch.Tensor:
    """The tokens generated without a cache."""
    model.cache_experts(0)
    tokens = model.generate(**options)
    model.cache_experts(None)
    return tokens


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("family", "options", "mode"),
    pairwise(
        ["t5", "t5_gated", "gpt2", "llama"],
        [{}, {"num_beams": 2}],
        [contextlib.nullcontext, torch.enable_grad, torch.inference_mode],
    ),
)
def test_same_tokens(family, options, mode, converted, made):
    model = stirred(converted(family, **LIGHT))
    with mode():
        plain = plain_tokens(model, **call(family, **options))
        assert made == []
        found = model.generate(**call(family, **options))
    assert torch.equal(found, plain)
    (cache,) = made
    assert built(cache) > 0
    assert 0 < cache.reserved <= cache.max_bytes == decoding_bytes(experts(model))


@pytest.mark.parametrize("tokens", [PATIENCE, PATIENCE + 2])
def test_a_short_answer_builds_nothing(tokens, converted, made, monkeypatch):
    """Folded blocks are kept at once; building full weights takes longer than a few tokens with the cores."""
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)
    model = converted("gpt2", **LIGHT)
    model.generate(**{**call("gpt2"), "max_new_tokens": tokens, "min_new_tokens": tokens})
    assert (built(made[0]) > 0) == (tokens > PATIENCE)


def swapped(model) -> None:
    """As averaged weights often are; leaves no trace."""
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter))


def fused_step(model) -> None:
    """As the Trainer's, which raises no version of a parameter."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.5, fused=True).step()


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("change", [swapped, fused_step])
@pytest.mark.parametrize("bound", [None, 10**9])
def test_changes_between_calls_are_noticed(change, bound, converted):
    model = stirred(converted("gpt2", **LIGHT))
    model.cache_experts(bound)
    before = model.generate(**call("gpt2"))
    logits = model(**batch("gpt2")).logits
    change(model)
    assert not torch.allclose(model(**batch("gpt2")).logits, logits)
    found = model.generate(**call("gpt2"))
    assert torch.equal(found, plain_tokens(model, **call("gpt2")))
    assert not torch.equal(found, before)


@pytest.mark.usefixtures("always")
def test_zero_turns_it_off_and_none_on_again(converted, made):
    model = converted("gpt2", **LIGHT)
    model.cache_experts(0)
    model.generate(**call("gpt2"))
    copy.deepcopy(model).generate(**call("gpt2"))
    assert made == []
    model.cache_experts(None)
    model.generate(**call("gpt2"))
    assert len(made) == 1
    for value, error in ((-5, ValueError), (1.5, TypeError), (True, TypeError)):
        refuses(error, "max_bytes must be ", model.cache_experts, value)


@pytest.mark.usefixtures("always")
def test_a_limit_that_the_user_chose(converted, made, tmp_path):
    """Copies of a model have it, saved models do not."""
    model = converted("gpt2", **LIGHT)
    wanted = plain_tokens(model, **call("gpt2"))
    model.cache_experts(10**9)
    model.save_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model)):
        assert torch.equal(each.generate(**call("gpt2")), wanted)
        cache = made.pop()
        assert cache.max_bytes == 10**9
        assert sum(kept.built > 0 for kept in cache.layers.values()) == len(experts(model))
    loaded = load_mpoe(tmp_path)
    assert torch.equal(loaded.generate(**call("gpt2")), wanted)
    assert made.pop().max_bytes == decoding_bytes(experts(model))


@pytest.mark.usefixtures("always")
def test_what_runs_once_takes_no_room_from_what_runs_again(converted, made):
    model = converted("t5", shape="paper")
    model.cache_experts(10**9)
    model.generate(**call("t5"))
    (cache,) = made
    encoder = set(experts(model.get_encoder()))
    assert encoder
    assert all((kept.built == 0) == (layer in encoder) for layer, kept in cache.layers.items())


@pytest.mark.usefixtures("always")
def test_gone_where_generate_fails(converted, made):
    model = converted("gpt2", **LIGHT)
    refuses(ValueError, "nonsense", model.generate, **call("gpt2"), nonsense=True)
    (cache,) = made
    assert current_routing() is None
    with torch.no_grad():
        model(**batch("gpt2"))
    assert cache.layers == {}
    with routing_context() as outer:
        refuses(ValueError, "nonsense", model.generate, **call("gpt2"), nonsense=True)
        assert current_routing() is outer


@pytest.mark.parametrize(
    ("config", "holds_blocks", "pays"),
    [
        (LIGHT, True, True),
        (LIGHT, True, False),
        ({"shape": "separable"}, True, False),
        ({"shape": "hidden"}, False, False),
        ({"shape": "neurons"}, False, False),
        ({"expert_type": "dense"}, False, False),
    ],
    ids=str,
)
def test_memory_is_taken_and_said_once_where_something_is_gained(
    config, holds_blocks, pays, converted, made, caplog, monkeypatch
):
    """Hidden-side and dense experts have nothing to cache; separable ones, and models this small, only views of their
    cores, of which the log says nothing."""
    if pays:
        monkeypatch.setattr("mpoe.layers.expert_cache.PATIENCE", 2)
        monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)
    transformers_logging.info_once.cache_clear()
    model = converted("gpt2", **config)
    with caplog.at_level(logging.INFO, LOG):
        for _ in range(2):
            model.generate(**call("gpt2"))
    assert len(made) == 2 * holds_blocks
    assert all((cache.reserved > 0) == (built(cache) > 0) == pays for cache in made)
    records = [record.message for record in caplog.records if record.name == LOG]
    assert len(records) == pays
    assert not pays or f"up to {decoding_bytes(experts(model)) / 1e6:.1f} MB" in records[0]
    assert not pays or "cache_experts(0)" in records[0]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("change", ["meta", "parametrised"])
def test_nothing_of_weights_that_may_not_be_kept(change, converted, made):
    model = converted("gpt2", **LIGHT)
    if change == "meta":
        model.to("meta")
    else:
        for layer in experts(model):
            torch.nn.utils.parametrize.register_parametrization(layer.up, "central", torch.nn.Identity())
    for bound in (None, 10**9):
        with kept_while_generating(model, bound) as cache:
            assert cache is None
    assert made == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bound_is_the_dense_layers_and_never_more_than_dense_experts(dtype, converted):
    dense = 4 * 3 * 24 * 48 * dtype.itemsize
    assert decoding_bytes(experts(converted("llama", **{**LIGHT, "num_experts": 8}).to(dtype))) == dense
    for config, room in ((LIGHT, True), ({**LIGHT, "num_experts": 1}, False)):  # the cores alone take more than one
        layers = experts(converted("llama", **config).to(dtype))
        cores = sum(core.nbytes for layer in layers for p in layer.projections().values() for core in p.cores())
        assert decoding_bytes(layers) == max(config["num_experts"] * dense - cores, 0) < dense
        assert bool(decoding_bytes(layers)) == room
