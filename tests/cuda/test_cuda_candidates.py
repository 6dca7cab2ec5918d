"""Which forms of a contraction the CUDA backend offers, from shapes and the device alone."""

from __future__ import annotations

import math

import pytest
import torch
from mpoe_bench.cases import workload_shape

from mpoe_kernels.contract import BlockDims, Contraction, contraction
from mpoe_kernels.linear.cuda import IN_PANELS, LinearKernels
from mpoe_kernels.linear.cuda.panels import LARGEST_TILE, gradient_tile
from mpoe_kernels.triton.architecture import SHARED_MEMORY

ALL = (True, True, True, True)


def plan(
    name: str,
    slots: int,
    phase: str = "forward",
    need: tuple[bool, bool, bool, bool] = ALL,
    strategy: str = "rebuild",
) -> Contraction:
    dims = BlockDims.of_shape(workload_shape(name, 768, 3072))
    return contraction(strategy, dims, 8, slots, torch.bfloat16, phase, need)


def kernels(shared_memory: int = SHARED_MEMORY["sm_90"]) -> LinearKernels:
    return LinearKernels(None, lambda _: shared_memory)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_weights_stay_on_chip_where_they_fit(phase: str) -> None:
    for shape in ("paper_64", "light_64"):
        asked = plan(shape, 64, phase)
        assert kernels().contraction_reasons(asked) == []
        assert [each.name for each in kernels().candidates(asked)] == [IN_PANELS]
        (reason,) = kernels(16 << 10).contraction_reasons(asked)
        assert reason == "no panel of a weight with bonds 64 and 64 fits 16384 bytes"


def test_other_strategies_are_refused_by_name() -> None:
    (reason,) = kernels().contraction_reasons(plan("paper_64", 64, strategy="chain"))
    assert reason == "it has a kernel for the strategy 'rebuild' only, not for 'chain'"


def test_tiles_of_gradients_are_large_and_fit() -> None:
    for name in ("paper_full", "paper_64", "light_64", "separable"):
        dims = BlockDims.of_shape(workload_shape(name, 768, 3072))
        iL, jL, iR, jR = tile = gradient_tile(dims)
        assert max(iL * iR, jL * jR, iL * jL, iR * jR) <= LARGEST_TILE
        assert math.prod(tile) >= 1024 or dims.is_separable
        assert not any(size % kept for size, kept in zip((dims.iL, dims.jL, dims.iR, dims.jR), tile, strict=True))
