"""Result rows written to other places, times their gates, by every kernel that may compute the last product."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpoe_kernels.linear.op import ForwardCall
from mpoe_kernels.testing.launches import recorded
from tests.cases import SMALL_SHAPES

from .linear_runs import ON_CHIP, Case, kernels_of

WAYS = ("chain", "half_left", "rebuild", ON_CHIP)


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits_elsewhere(way: str, dtype: torch.dtype) -> None:
    """The gate multiplies the rounded result; rows of slots without an expert are zero, whatever their gates."""
    shape = SMALL_SHAPES["light"]
    case = Case(shape, dtype, tokens=13, experts=3, top_k=1, capacity=3, kind="zipf", activation="gelu")
    forward, call = kernels_of(way).forward, ForwardCall(*case._common(way), False)
    filled, y = int(case.routing.expert_offsets[-1]), forward(call)[0]
    assert 0 < filled < 13
    out_index, gates = torch.randperm(13), torch.rand(13) + 0.5
    gates[out_index[filled:]] = float("nan")
    wanted = (y.float() * gates[out_index][:, None]).to(dtype)
    wanted[filled:] = 0
    placed = forward(replace(call, out_index=out_index, gates=gates))[0]
    assert torch.equal(placed[out_index], wanted)


def test_on_chip_it_is_no_launch_more() -> None:
    case = Case(SMALL_SHAPES["light"], torch.bfloat16, tokens=13, experts=3, top_k=1)
    forward, call = kernels_of(ON_CHIP).forward, ForwardCall(*case._common(ON_CHIP), False)
    with recorded("sm_90") as plain:
        forward(call)
    with recorded("sm_90") as placing:
        forward(replace(call, out_index=torch.arange(13), gates=torch.ones(13)))
    assert len(plain) == len(placing) == 1
    assert placing[0].arguments["out_index"] is not None
