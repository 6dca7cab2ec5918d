"""What the native kernels of neuron_experts refuse where no public function stands before them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpoe_kernels.neurons.native import forward
from mpoe_kernels.neurons.op import NeuronCall

X, GATES, EXPERT, WEIGHTS = torch.ones(3, 4), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.long), torch.ones(2, 5, 4)


@pytest.mark.usefixtures("native_library")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X[0], GATES, EXPERT, WEIGHTS, WEIGHTS, None, None, "relu"),
            r"x must have 2 axes, up and down 3; got",
        ),
        (
            (X, GATES[:2], EXPERT, WEIGHTS, WEIGHTS, None, None, "relu"),
            r"gates and top_k_index must be \[T, K\] with T = 3",
        ),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS[:1], None, None, "relu"), r"down must be float32 \[2, 5, 4\]; got"),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS, GATES, None, "relu"), r"bias must be float32 \[2, 5\]; got"),
        ((X, GATES, EXPERT + 2, WEIGHTS, WEIGHTS, None, None, "relu"), r"top_k_index must lie in -1\.\.1; got 2"),
        ((X, GATES, EXPERT, WEIGHTS, WEIGHTS, None, None, "tanh"), "unknown activation tanh"),
        (
            (X.double(), GATES, EXPERT, WEIGHTS.double(), WEIGHTS.double(), None, None, "relu"),
            "x must be float32 or bfloat16; got float64",
        ),
    ],
)
def test_neuron_experts_are_refused_plainly(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(NeuronCall(*arguments, "native"))
