"""`model.cache_experts`: one bound for all layers, the same tokens, nothing in saved models."""

from __future__ import annotations

import copy

import pytest
import torch

from mpoe import load_mpoe
from mpoe.layers import MPOExperts

from .small_models import MASK, batch

PLENTY = 10**9


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full weights wherever they are allowed: models this small never benefit from them."""
    monkeypatch.setattr("mpoe.layers.experts.full_weights_pay", lambda *_: True)


def call(family: str) -> dict:
    mask = MASK if family.startswith("t5") else MASK.flip(1)
    ids = batch(family, labels=False)["input_ids"]
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}


@pytest.mark.parametrize("family", ["t5", "t5_gated", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_uses_it_and_gives_the_same_tokens(family, options, converted):
    model = converted(family, shape="paper", auxiliary_noise=0.3)
    model.cache_experts(0)
    plain = model.generate(**call(family), **options)
    cache = model.cache_experts(PLENTY)
    assert torch.equal(model.generate(**call(family), **options), plain)
    report = cache.report()
    assert report.hits > 0
    assert report.built == report.experts > 0
    assert report.refused == 0


def test_the_bound_is_the_models(converted):
    """Room for all layers' blocks and one layer's experts: the decoder's last, which runs for every token."""
    model = converted("t5", shape="paper")
    model.cache_experts(0)
    plain = model.generate(**call("t5"))
    layers = [m for m in model.modules() if isinstance(m, MPOExperts)]
    caches = [layer.cache_experts(PLENTY) for layer in layers]
    blocks = [
        [cache.layer(layer, layer.projections()) for _ in range(2)][1].bytes
        for cache, layer in zip(caches, layers, strict=True)
    ]
    cache = model.cache_experts(sum(blocks) + 4 * 24 * 48 * 2 * 4)
    for _ in range(2):
        assert torch.equal(model.generate(**call("t5")), plain)
        report = cache.report()
        assert 0 < report.experts <= 4
        assert sum(blocks[-1:]) < report.bytes <= report.max_bytes
    assert report.refused > 0
    assert cache.layer(layers[-1], layers[-1].projections()).full
    assert not any(cache.layer(layer, layer.projections()).full for layer in layers[:-1])
    assert model.cache_experts(0) is None
    assert all(layer.expert_cache is None for layer in layers)


def test_training_between_generations(converted):
    model, other = (converted("gpt2", shape="paper", auxiliary_noise=0.1) for _ in range(2))
    other.load_state_dict(model.state_dict())
    cache = model.cache_experts(PLENTY)
    model.generate(**call("gpt2"))
    for trained in (model, other):
        trained.train()
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.05)
        inputs = batch("gpt2")
        trained(**inputs).loss.backward()
        optimizer.step()
        trained.eval()
    assert cache.report().bytes == 0
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
    assert torch.equal(model.generate(**call("gpt2")), other.generate(**call("gpt2")))


def test_saves_and_copies_hold_none_of_it(converted, tmp_path):
    model = converted("gpt2", shape="paper")
    names = set(model.state_dict())
    model.cache_experts(PLENTY)
    plain = model.generate(**call("gpt2"))
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = load_mpoe(tmp_path)
    assert all(m.expert_cache is None for m in loaded.modules() if isinstance(m, MPOExperts))
    assert torch.equal(loaded.generate(**call("gpt2")), plain)
    copied = copy.deepcopy(model)
    caches = {id(m.expert_cache) for m in copied.modules() if isinstance(m, MPOExperts)}
    assert len(caches) == 1  # one bound there, too
    assert torch.equal(copied.generate(**call("gpt2")), plain)


def test_models_without_mpo_experts_are_refused(converted):
    with pytest.raises(ValueError, match="MPO experts; MPOEGPT2LMHeadModel has none"):
        converted("gpt2", expert_type="dense").cache_experts(PLENTY)
    with pytest.raises(ValueError, match="max_bytes must be at least 1"):
        converted("gpt2").cache_experts(-5)
