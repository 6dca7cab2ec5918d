"""A wider dense model computes the same, has a mixture's size, and its new units learn."""

from __future__ import annotations

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe
from mpoe.data.embedded import load_stand_in
from mpoe.models.table import DENSE
from mpoe.models.widen import hidden_size_as_mixture, widened

from .tiny_families import GENERATED, first_result, text_rows, tiny_batch, tiny_model


@pytest.mark.parametrize("family", DENSE)
def test_of_every_family(family: str) -> None:
    name = next(name for model_type, _, name in GENERATED if model_type == family)
    dense = tiny_model(family, name)
    mixture = convert_to_mpoe(dense, MPOEConfig(num_experts=4))
    hidden = hidden_size_as_mixture(dense, mixture.mpoe_config)
    wide, less = widened(dense, hidden), widened(dense, hidden - 1)
    size, smaller, wanted = (sum(p.numel() for p in model.parameters()) for model in (wide, less, mixture))
    assert abs(size - wanted) <= (size - smaller) / 2
    batch = tiny_batch(dense, family)
    with torch.inference_mode():
        first, second = (text_rows(first_result(model(**batch)), batch) for model in (wide, dense))
    assert torch.allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_new_units_learn_from_the_first_step_on(kind: str) -> None:
    dense, _ = load_stand_in(kind)
    size = dense.config.d_ff if kind == "t5" else 4 * dense.config.n_embd
    wide = widened(dense, size + 24)
    assert getattr(wide, "loss_type", None) == getattr(dense, "loss_type", None)  # without it GPT-2 warns
    tokens = torch.randint(0, 100, (2, 9))
    wide(tokens, labels=tokens).loss.backward()
    (name,) = [n for n, _ in wide.named_parameters() if n.endswith(("wo.weight", "mlp.c_proj.weight"))][:1]
    grad = wide.get_parameter(name).grad
    assert (grad[:, size:] if kind == "t5" else grad[size:]).abs().sum() > 0


def test_a_mixture_cannot_be_widened() -> None:
    with pytest.raises(ValueError, match=r"a wider model must be of t5, .*; got mixtral"):
        hidden_size_as_mixture(tiny_model("mixtral", "MixtralForCausalLM"), MPOEConfig())
