"""Which forms of a contraction the CUDA backend offers, from shapes and the device alone."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import workload_shape

from mpoe_kernels.contract import BlockDims, Contraction, contraction
from mpoe_kernels.linear.cuda import IN_PANELS, LinearKernels
from mpoe_kernels.triton.architecture import SHARED_MEMORY

ALL, WITHOUT_X = (True, True, True, True), (False, True, True, True)


def plan(
    name: str,
    slots: int,
    phase: str = "forward",
    need: tuple[bool, bool, bool, bool] = ALL,
    strategy: str = "rebuild",
) -> Contraction:
    dims = BlockDims.of_shape(workload_shape(name, 768, 3072))
    return contraction(strategy, dims, 8, slots, torch.bfloat16, phase, need)


def names(asked: Contraction, shared_memory: int = SHARED_MEMORY["sm_90"]) -> list[str]:
    return [each.name for each in LinearKernels(None, lambda _: shared_memory).candidates(asked)]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_weights_stay_on_chip_where_they_fit(phase: str) -> None:
    for shape in ("paper_64", "light_64"):
        assert names(plan(shape, 64, phase)) == [IN_PANELS, "rebuild"]
        assert names(plan(shape, 64, phase), 16 << 10) == ["rebuild"]


def test_without_a_gradient_of_x_nothing_is_rebuilt_in_panels() -> None:
    assert names(plan("paper_64", 64, "backward", need=WITHOUT_X)) == ["rebuild"]


def test_other_strategies_and_nothing_to_do() -> None:
    assert names(plan("paper_64", 64, strategy="chain")) == ["chain"]
    assert names(plan("paper_64", 0)) == ["rebuild"]
