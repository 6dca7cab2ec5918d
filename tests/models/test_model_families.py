"""Every family and head, as every kind of mixture: no result changes, and a saved model loads as the same model."""

from __future__ import annotations

import pytest
import torch
import transformers

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.layers import HiddenFeedForward, MPOEFeedForward, NeuronFeedForward
from mpoe.models.table import DENSE, TABLE

from .kept_models import stirred
from .tiny_models import GENERATED, first_result, text_rows, tiny_batch, tiny_model

# Families without a module for the feed-forward network, so that nothing can go beside or between the projections.
WITHOUT_A_MODULE = ("bart", "opt")
SHAPES = ("separable", "paper", "light")
ONE_OF_EACH = {case[0]: case[2] for case in reversed(GENERATED)}
# Of families with the same structure, the first.
FIRST = {TABLE[t].models: t for t in reversed(DENSE)}.values()


def cases():
    """By default one MPO shape and neurons per class, of families with the same structure those of the first and of the
    others' language models; without a shape one class of each family."""
    for place, case in enumerate(GENERATED):
        model_type, auto, name = case
        usual = model_type in FIRST or auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM")
        shapes = [*SHAPES, *(["neurons"] if model_type not in WITHOUT_A_MODULE else [])]
        for shape in [*shapes, *([None] if ONE_OF_EACH[model_type] == name else [])]:
            default = shape is None or (usual and shape in ("neurons", SHAPES[place % len(SHAPES)]))
            marks = [] if default else [pytest.mark.slow]
            yield pytest.param(*case, shape, id=f"{model_type}-{name}-{shape}", marks=marks)


@pytest.mark.parametrize(("model_type", "auto", "name", "shape"), list(cases()))
@torch.no_grad()
def test_converts_exactly_and_reloads(model_type, auto, name, shape, tmp_path):
    model = tiny_model(model_type, name)
    inputs = tiny_batch(model, model_type)
    whole = first_result(model(**inputs))
    expected = text_rows(whole, inputs)
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=3, shape=shape))
    assert type(converted).__name__ == f"MPOE{name}"
    config, kind = converted.mpoe_config, MPOEFeedForward
    if shape is None:  # hidden-side experts, two per token; where blocks do not fit, separable experts
        without = model_type in WITHOUT_A_MODULE
        assert TABLE[model_type].takes_blocks is not without
        assert (config.shape, config.top_k) == (("separable", 1) if without else ("hidden", 2))
        kind = MPOEFeedForward if without else HiddenFeedForward
    elif shape == "neurons":
        kind = NeuronFeedForward
    assert any(isinstance(module, kind) for module in converted.modules())
    output = converted(**inputs)
    if shape == "neurons":
        assert torch.equal(first_result(output), whole)
        output = stirred(converted)(**inputs)
        assert not torch.equal(first_result(output), whole)
    else:
        found = text_rows(first_result(output), inputs)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert output.expert_load.sum() > 0
    converted.save_pretrained(tmp_path)
    for again in (load_mpoe(tmp_path), getattr(transformers, auto).from_pretrained(tmp_path)):
        assert type(again) is type(converted)
        assert again.mpoe_config == config
        assert torch.equal(first_result(again(**inputs)), first_result(output))
        assert list(again.state_dict()) == list(converted.state_dict())
