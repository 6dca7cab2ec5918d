"""Result rows written to other places, times their gates, by the kernel of the fused contraction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoe_kernels.linear.op import ForwardCall
from tests.assertions import poisoned_memory
from tests.cases import SMALL_SHAPES

from .emulated_linear import Case
from .emulation import KERNELS


def forward(case: Case, strategy: str, out_index: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
    call = ForwardCall(*case.linear.common, strategy, "emulated", False, case.slot_of_token, out_index, gates)
    with poisoned_memory():
        return KERNELS.forward(call)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "strategy"),
    [("light", "rebuild"), ("light", "chain"), ("separable", "separable"), ("separable_mirrored", "separable")],
)
def test_the_same_bits_elsewhere(name: str, strategy: str, dtype: torch.dtype) -> None:
    """The gate multiplies the rounded result; rows of slots without an expert are zero, whatever their gates."""
    case = Case(SMALL_SHAPES[name], dtype, tokens=13, experts=3, top_k=1, capacity=3, kind="zipf", activation="gelu")
    y = forward(case, strategy)
    filled = int(case.routing.expert_offsets[-1])
    assert 0 < filled < 13
    out_index, gates = torch.randperm(13), torch.rand(13) + 0.5
    gates[out_index[filled:]] = float("nan")
    placed = forward(case, strategy, out_index, gates)
    wanted = (y.float() * gates[out_index][:, None]).to(dtype)
    wanted[filled:] = 0
    assert torch.equal(placed[out_index], wanted)
