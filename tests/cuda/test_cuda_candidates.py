"""Which forms of a contraction the CUDA backend offers, from shapes and the device alone."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.cases import workload_shape

from mpoe_kernels.contract import BlockDims, Contraction, contraction
from mpoe_kernels.linear.cuda import LinearKernels
from mpoe_kernels.linear.grouped import ON_CHIP

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


KERNELS = LinearKernels(None)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("shape", ["paper_64", "light_64", "paper_full", "separable"])
def test_weights_stay_on_chip(phase: str, shape: str) -> None:
    asked = plan(shape, 64, phase)
    assert KERNELS.contraction_reasons(asked) == []
    assert [each.name for each in KERNELS.candidates(asked)] == [ON_CHIP]


@pytest.mark.parametrize("strategy", ["half_left", "half_right", "chain", "separable"])
def test_other_strategies_go_product_by_product(strategy: str) -> None:
    asked = plan("separable" if strategy == "separable" else "paper_64", 64, strategy=strategy)
    assert KERNELS.contraction_reasons(asked) == []
    assert [each.name for each in KERNELS.candidates(asked)] == [strategy]


def test_too_many_rows_are_refused() -> None:
    (reason,) = KERNELS.contraction_reasons(plan("separable", 2**28, strategy="separable"))
    assert "it counts to 2147483647" in reason
