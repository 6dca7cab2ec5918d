"""Every family, head and shape: conversion does not change results, and a saved model loads as the same model."""

from __future__ import annotations

import pytest
import torch
import transformers

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.layers import HiddenFeedForward, MPOEFeedForward
from mpoe.models.table import DENSE, TABLE

from .tiny_families import GENERATED, first_result, text_rows, tiny_batch, tiny_model

SHAPES = ("separable", "paper", "light")
IDS = [f"{model_type}-{name}" for model_type, _, name in GENERATED]
# By default one shape per class; of families with the same structure, the first and the others' language models.
FIRST = {TABLE[t].models: t for t in reversed(DENSE)}


def slice_of(cases):
    for place, (case, identity) in enumerate(zip(cases, IDS, strict=True)):
        for number, shape in enumerate(SHAPES):
            usual = case[0] in FIRST.values() or case[1] in ("AutoModelForCausalLM", "AutoModelForMaskedLM")
            default = usual and number == place % len(SHAPES)
            yield pytest.param(*case, shape, id=f"{identity}-{shape}", marks=[] if default else [pytest.mark.slow])


# Families without a module for the feed-forward network, so that blocks cannot go between the projections.
WITHOUT_BLOCKS = ("bart", "opt")
ONE_OF_EACH = {case[0]: case[2] for case in reversed(GENERATED)}


@pytest.mark.parametrize("model_type", ONE_OF_EACH)
@torch.no_grad()
def test_converts_by_default(model_type, tmp_path):
    """Without a shape: hidden-side experts, two per token; where blocks do not fit, separable experts."""
    model = tiny_model(model_type, ONE_OF_EACH[model_type])
    inputs = tiny_batch(model, model_type)
    expected = text_rows(first_result(model(**inputs)), inputs)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=3))
    without = model_type in WITHOUT_BLOCKS
    assert TABLE[model_type].takes_blocks is not without
    kind = MPOEFeedForward if without else HiddenFeedForward
    assert any(isinstance(module, kind) for module in converted.modules())
    config = converted.mpoe_config
    assert (config.shape, config.top_k) == (("separable", 1) if without else ("hidden", 2))
    output = converted(**inputs)
    assert (text_rows(first_result(output), inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    converted.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path)
    assert again.mpoe_config == config
    assert torch.equal(first_result(again(**inputs)), first_result(output))


@pytest.mark.parametrize(("model_type", "auto", "name", "shape"), list(slice_of(GENERATED)))
@torch.no_grad()
def test_converts_exactly_and_reloads(model_type, auto, name, shape, tmp_path):
    model = tiny_model(model_type, name)
    inputs = tiny_batch(model, model_type)
    expected = text_rows(first_result(model(**inputs)), inputs)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=3, shape=shape))
    assert type(converted).__name__ == f"MPOE{name}"
    assert any(isinstance(module, MPOEFeedForward) for module in converted.modules())
    output = converted(**inputs)
    found = text_rows(first_result(output), inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert output.expert_load.sum() > 0
    converted.save_pretrained(tmp_path)
    for again in (load_mpoe(tmp_path), getattr(transformers, auto).from_pretrained(tmp_path)):
        assert type(again) is type(converted)
        assert torch.equal(first_result(again(**inputs)), first_result(output))
        assert list(again.state_dict()) == list(converted.state_dict())
