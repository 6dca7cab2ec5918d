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


def case_of(dtype: torch.dtype = torch.bfloat16, activation: str = "gelu") -> Case:
    return Case(
        SMALL_SHAPES["light"], dtype, tokens=13, experts=3, top_k=1, capacity=3, kind="zipf", activation=activation
    )


def forward(case: Case, out_index: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
    call = ForwardCall(*case.linear.common, "rebuild", "emulated", False, case.slot_of_token, out_index, gates)
    with poisoned_memory():
        return KERNELS.forward(call)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_elsewhere(dtype: torch.dtype) -> None:
    """The gate multiplies the rounded result; rows of slots without an expert are zero, whatever their gates."""
    case = case_of(dtype)
    y = forward(case)
    filled = int(case.routing.expert_offsets[-1])
    assert 0 < filled < 13
    out_index, gates = torch.randperm(13), torch.rand(13) + 0.5
    gates[out_index[filled:]] = float("nan")
    placed = forward(case, out_index, gates)
    wanted = (y.float() * gates[out_index][:, None]).to(dtype)
    wanted[filled:] = 0
    assert torch.equal(placed[out_index], wanted)
