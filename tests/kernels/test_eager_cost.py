"""The eager cost model counts what the kernels do."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.eager import cost
from mpoe_kernels.contract import HARDWARE, BlockDims, contraction, contractions
from mpoe_kernels.planner.cost import new_bytes
from mpoe_kernels.testing.cases import random_blocks, workload_shape

from .backend_cases import eager_kernel

EXPERTS, SLOTS = 4, 32
GEMMS = {"mm", "bmm", "addmm_", "addmm"}
SHAPES = {
    "light": workload_shape("light_16", 96, 128),
    "paper": workload_shape("paper_16", 96, 128),
    "separable": workload_shape("separable", 96, 128),
}


class CountGemms(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.__name__.split(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def gemms(self) -> int:
        return sum(self.calls[name] for name in GEMMS)


def dims_of(name: str) -> BlockDims:
    shape = SHAPES[name]
    return BlockDims.of_shape(shape)


CASES = [
    (name, plan.strategy) for name in SHAPES for plan in contractions(dims_of(name), 1, 1, torch.float32, "forward")
]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_gemm_calls(name: str, strategy: str, phase: str) -> None:
    shape, dims = SHAPES[name], dims_of(name)
    blocks = random_blocks(shape, EXPERTS, torch.float32)
    x, grad = torch.ones(SLOTS, shape.in_features), torch.ones(SLOTS, shape.out_features)
    offsets = torch.arange(EXPERTS + 1, dtype=torch.int32) * (SLOTS // EXPERTS)
    given = (x, blocks.left, blocks.central, blocks.right, offsets, None, None)
    common = (*given, shape.in_features, shape.out_features, "none", strategy, "eager")
    with CountGemms() as forward:
        _, h, z = eager_kernel("grouped_mpo_linear")(ForwardCall(*common, save=True))
    with CountGemms() as backward:
        eager_kernel("grouped_mpo_linear_backward")(BackwardCall(*common, grad, h, z, need=[True] * 4 + [False]))
    made = (forward if phase == "forward" else backward).gemms
    plan = contraction(strategy, dims, EXPERTS, SLOTS, torch.float32, phase)
    counted, _ = (cost._rebuild if strategy == "rebuild" else cost._rows)(plan)
    assert made > 0
    if strategy == "rebuild":  # the numbers of slabs and panels depend a little on the order
        assert abs(counted - made) <= 0.2 * made
    else:
        assert counted == made


def test_copies_in_short_runs_cost_more() -> None:
    dims = dims_of("light")
    plan = contraction("rebuild", dims, 1, 8, torch.float32, "forward")
    traffic = cost._Traffic(plan, chunks=1)
    traffic.copy(1000, ("iL", "iC"), ("iL", "iC"))
    assert (traffic.copied, traffic.new) == (0, 0), "nothing to do"
    long = dims._replace(jR=16)
    traffic.dims = long
    traffic.copy(1000, ("iL", "iC", "jR"), ("iC", "iL", "jR"))
    assert traffic.copied == 8000, "runs of 64 bytes"
    traffic.dims = long._replace(jR=15)
    traffic.copy(1000, ("iL", "iC", "jR"), ("iC", "iL", "jR"))
    assert traffic.copied == pytest.approx(8000 + 8000 / cost.SHORT_RUNS)
    traffic.copy(1 << 18, ("iL", "iC"), ("iC", "iL"))
    assert traffic.new == new_bytes(1 << 20)


def test_small_arrays_are_reused_and_large_ones_are_not() -> None:
    assert new_bytes((1 << 20) - 1) == 0
    assert 0 < new_bytes(8 << 20) < 8 << 20
    assert new_bytes(32 << 20) == 32 << 20


@pytest.mark.parametrize("name", ["cpu-generic", "cpu-avx512-bf16", "h100"])
def test_every_prediction_is_finite_and_grows_with_rows(name: str) -> None:
    for shape in SHAPES:
        for phase in ("forward", "backward"):
            for plan in contractions(dims_of(shape), EXPERTS, 64, torch.bfloat16, phase):
                few = cost._seconds(plan, HARDWARE[name])
                many = contraction(plan.strategy, plan.dims, EXPERTS, 4096, torch.bfloat16, phase)
                assert 0 < few < cost._seconds(many, HARDWARE[name]) < 1
                none = contraction(plan.strategy, plan.dims, EXPERTS, 0, torch.bfloat16, phase)
                assert cost._seconds(none, HARDWARE[name]) < few


def test_slow_page_faults_favour_what_allocates_least() -> None:
    dims = BlockDims(12, 16, 192, 4, 8, 384, 16, 24, 768, 3072)
    rebuild, half = (contraction(s, dims, 8, 512, torch.float32, "forward") for s in ("rebuild", "half_left"))
    cpu = HARDWARE["cpu-generic"]
    slow = dataclasses.replace(cpu, new_memory_bandwidth=1e9)
    more = [cost._seconds(plan, slow) - cost._seconds(plan, cpu) for plan in (rebuild, half)]
    assert 0 < more[0] < more[1]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (("iR", "a", "jC", "b"), ("iR", "jC", "b", "a"), 1000),  # 32 elements, 8 KiB apart
        (("iR", "a", "jC", "b"), ("iR", "jC", "a", "b"), 0),  # runs of 32
        (("jC", "b", "a", "iR"), ("iR", "jC", "b", "a"), 0),  # 16 bytes apart
        (("iL", "jC", "b"), ("jC", "b", "iL"), 0),  # no more than a set has ways
    ],
)
def test_elements_that_share_a_cache_set(before: tuple[str, ...], after: tuple[str, ...], expected: int) -> None:
    dims = BlockDims(iL=4, jL=8, a=32, iC=64, jC=64, b=32, iR=4, jR=8, in_features=1024, out_features=4096)
    traffic = cost._Traffic(contraction("chain", dims, 1, 1, torch.float32, "forward"), chunks=1)
    traffic.copy(1000, before, after)
    assert traffic.aliased == expected
    assert traffic.copied >= 8000
