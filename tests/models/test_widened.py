"""Dense networks that are as large as a mixture."""

import copy

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.data.stand_in_models import load_stand_in
from mpoe.models.find import hidden_size_as_mixture, widened
from mpoe.models.table import TABLE

from .tiny_models import FIRST, first_class, result, text_rows, tiny_batch, tiny_model


@pytest.mark.parametrize(
    "family", [pytest.param(t, marks=[pytest.mark.exhaustive] * (t not in FIRST)) for t in TABLE]
)
def test_as_many_parameters_and_the_same_outputs(family):
    dense = tiny_model(family, first_class(family))
    mixture = convert_to_mpoe(dense, MPOEConfig(num_experts=4))
    hidden = hidden_size_as_mixture(dense, mixture.mpoe_config)
    wide, narrower = widened(dense, hidden), widened(dense, hidden - 1)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (wide, narrower, mixture)]
    assert abs(sizes[0] - sizes[2]) <= (sizes[0] - sizes[1]) / 2
    inputs = tiny_batch(dense, family)
    with torch.inference_mode():
        before, after = (text_rows(result(model(**inputs)), inputs) for model in (dense, wide))
    assert torch.allclose(after, before, atol=1e-4)


def test_a_decoder_of_another_size_counts_with_its_own():
    dense = tiny_model("bart", first_class("bart"))
    config = copy.deepcopy(dense.config)
    config.decoder_ffn_dim = 2 * config.encoder_ffn_dim
    unlike = type(dense)(config)
    mixture = convert_to_mpoe(unlike, MPOEConfig(num_experts=4, shape="separable"))
    hidden = hidden_size_as_mixture(unlike, mixture.mpoe_config)
    wide, wider = widened(dense, hidden), widened(dense, hidden + 1)
    unit = wider.num_parameters() - wide.num_parameters()
    assert abs(wide.num_parameters() - mixture.num_parameters()) <= unit / 2


def test_new_units_of_t5_learn_from_the_first_step_on():
    dense, _ = load_stand_in("t5")
    size = dense.config.d_ff
    # Untied, as a checkpoint of T5 v1.1 has it.
    dense.lm_head.weight = torch.nn.Parameter(torch.randn_like(dense.lm_head.weight))
    wide = trained_once(dense, size + 24)
    assert wide.encoder.block[0].layer[1].DenseReluDense.wo.weight.grad[:, size:].any()


def test_new_units_of_gpt2_learn_from_the_first_step_on():
    dense, _ = load_stand_in("gpt2")
    size = 4 * dense.config.n_embd
    wide = trained_once(dense, size + 24)
    assert wide.loss_type == dense.loss_type  # without it GPT-2 warns
    assert wide.transformer.h[0].mlp.c_proj.weight.grad[size:].any()


def trained_once(dense, size):
    """A wider model with the gradients of one step."""
    wide = widened(dense, size)
    assert torch.equal(wide.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    tokens = torch.randint(0, 100, (2, 9))
    wide(tokens, labels=tokens).loss.backward()
    return wide
