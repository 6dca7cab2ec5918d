"""The native cost model counts what the kernels do."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpoe_kernels.linear.native import cost, work
from mpoe_kernels.linear.native.kernels import IMPLEMENTED
from mpoe_kernels.contract import HARDWARE, BlockDims, Contraction, contraction, contractions
from mpoe_kernels.testing.cases import workload_shape

EXPERTS, SLOTS = 4, 256
PHASES = ("forward", "backward")
CPU = HARDWARE["cpu-avx512-bf16"]
# Every size that may run along a panel is a multiple of 32, and contracting (iC, jC) with left is cheaper.
EVEN = BlockDims(iL=32, jL=32, a=32, iC=2, jC=2, b=32, iR=32, jR=32, in_features=2048, out_features=2048)
SEPARABLE = BlockDims(iL=32, jL=1, a=32, iC=2, jC=2, b=32, iR=1, jR=32, in_features=64, out_features=64)


def dims_of(name: str) -> BlockDims:
    shape = workload_shape(name, 96, 128)
    return BlockDims.of_shape(shape)


def plan_of(strategy: str, phase: str, dims: BlockDims = EVEN, slots: int = SLOTS, **more) -> Contraction:
    return contraction(strategy, dims, EXPERTS, slots, more.pop("dtype", torch.float32), phase, **more)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("strategy", ["rebuild", "separable"])
def test_multiply_adds_are_those_of_the_plan(strategy: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "instructions", lambda: "avx512")
    monkeypatch.setattr(work, "VECTORS", work.VECTORS._replace(load_rows=0.0))
    plan = plan_of(strategy, phase, SEPARABLE if strategy == "separable" else EVEN)
    assert work.work_of(plan).flops == plan.flops


@pytest.mark.parametrize("strategy", ["half_left", "half_right"])
def test_half_builds_twice_for_a_backward(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows before x's gradient, and the half-built weight, are computed separately for x and for the blocks."""
    monkeypatch.setattr(work, "instructions", lambda: "avx512")
    monkeypatch.setattr(work, "VECTORS", work.VECTORS._replace(load_rows=0.0))
    forward, backward = (plan_of(strategy, phase) for phase in PHASES)
    assert work.work_of(forward).flops == forward.flops
    again = {step.name: step.flops for step in backward.steps if step.name in ("LC = L C", "CR = C R")}
    assert len(again) == 1
    rows = [step.flops for step in backward.steps if step.name.startswith("d rows before")]
    assert work.work_of(backward).flops == backward.flops + sum(again.values()) + rows[0]


def test_panels_are_paid_whole_and_tiles_for_their_loads() -> None:
    counted = work.Work(plan_of("rebuild", "forward"), isa="avx512bf16")
    counted.multiply(3, rows=15, columns=33, k=385)
    assert counted.flops == 2 * 3 * (15 + 2) * 64 * 385
    assert counted.tiles == 3 * 2 * 2 * 2
    half = work.Work(plan_of("rebuild", "forward", dtype=torch.bfloat16), isa="avx512bf16")
    half.multiply(1, rows=1, columns=32, k=3)
    assert half.flops == 2 * (1 + 1) * 32 * 4, "an odd k of bfloat16 is padded"


def test_amx_leaves_short_sums_and_rests_to_vectors() -> None:
    plan = plan_of("rebuild", "forward", dtype=torch.bfloat16)

    def flops(k: int, isa: str = "amx") -> float:
        counted = work.Work(plan, isa=isa)
        counted.multiply(1, rows=32, columns=32, k=k)
        return counted.flops

    assert flops(62) == work.VECTOR_WEIGHT * flops(62, "avx512bf16"), "31 units"
    assert flops(64) == 2 * (32 + work.AMX.load_rows) * 32 * 64
    assert flops(64 + 2) - flops(64) == work.VECTOR_WEIGHT * flops(2, "avx512bf16")
    single = work.Work(plan_of("rebuild", "forward"), isa="amx")
    single.multiply(1, rows=32, columns=32, k=64)
    assert single.flops == 2 * (32 + 3) * 32 * 64, "float32 has none"


@pytest.mark.parametrize("strategy", ["rebuild", "half_left", "half_right"])
def test_what_is_not_needed_is_not_done(strategy: str) -> None:
    whole = work.work_of(plan_of(strategy, "backward"))
    masked = work.work_of(plan_of(strategy, "backward", mask_central=True))
    only_x = work.work_of(plan_of(strategy, "backward", need=(True, False, False, False)))
    assert only_x.flops < masked.flops < whole.flops
    assert masked.summed == 0 < whole.summed
    nothing = plan_of(strategy, "backward", need=(False,) * 4)
    assert work.work_of(nothing) == work.Work(nothing)


def test_half_right_is_half_left_of_the_mirrored_problem() -> None:
    dims = dims_of("paper_16")
    for phase in PHASES:
        right = work.work_of(plan_of("half_right", phase, dims))
        left = work.work_of(plan_of("half_left", phase, work.mirrored(dims)))
        assert (right.flops, right.tiles) == (left.flops, left.tiles)
        assert right.copied > left.copied


def test_threads_wait_for_the_one_with_most_tasks() -> None:
    two = dataclasses.replace(CPU, units=2)
    plan = plan_of("half_left", "forward")
    alone, pair = (dataclasses.replace(plan, busy_experts=experts) for experts in (1, 2))
    assert (work.tasks_of(alone), work.tasks_of(pair)) == (1, 2)
    assert cost._idle(1, 2) == 2
    assert cost._idle(3, 2) == pytest.approx(4 / 3)
    assert cost._idle(None, 48) == 1
    assert cost._seconds(alone, two) > cost._seconds(plan, two)


def test_few_slots_do_not_pay_for_packing_central() -> None:
    """A separable backward reads it once and writes its gradient once; a chain, after left, keeps panels in cache."""
    dims = BlockDims.of_shape(workload_shape("separable", 1024, 4096))
    central = dims.a * dims.iC * dims.jC * dims.b
    few, many = (work.work_of(plan_of("separable", "backward", dims, slots=slots)).copied for slots in (64, 65))
    assert few + central < many < few + 1.1 * central
    dims = BlockDims.of_shape(workload_shape("light_64", 1024, 4096))
    few, many = (plan_of("chain", "backward", dims, slots=slots) for slots in (1, 64))
    assert (work.packs_by_piece(few), work.packs_by_piece(many)) == (True, False)
    assert work.work_of(few).copied_by_all == work.work_of(few).summed == 0
    assert work.work_of(many).copied_by_all == 3 * central, "into order, and panels for both directions"
    assert (work.tasks_of(few), work.tasks_of(many)) == (None, work.MOST_GROUPS)
    dims = BlockDims.of_shape(workload_shape("light_32", 3072, 768))
    assert dims.chain_order[0] == "C"
    rows = dims.iL * dims.iR
    for phase, most in (("forward", work.FEW_ROWS), ("backward", work.FEW_GRADIENT_ROWS)):
        few, many = (plan_of("chain", phase, dims, slots=most // rows + more) for more in (0, 1))
        assert (work.packs_by_piece(few), work.packs_by_piece(many)) == (True, False)


def test_a_chain_of_few_rows_leaves_threads_idle() -> None:
    dims = dims_of("paper_16")
    assert [work.tasks_of(plan_of("chain", "forward", dims, slots=slots)) for slots in (1, 3)] == [1, 3]
    assert work.tasks_of(plan_of("rebuild", "forward", dims, slots=1)) is None


@pytest.mark.parametrize("strategy", ["rebuild", "half_left", "half_right", "chain"])
def test_gradients_of_every_expert_and_sums_are_new_memory(strategy: str) -> None:
    dims = BlockDims.of_shape(workload_shape("light_32", 1024, 4096))
    whole, masked, only_x = (
        work.work_of(contraction(strategy, dims, 1024, SLOTS, torch.float32, "backward", need)).new
        for need in ((True,) * 4, (True, True, False, True), (True, False, False, False))
    )
    central = dims.a * dims.iC * dims.jC * dims.b * 4
    assert whole - masked >= 0.5 * 2 * central, "the gradient, and its sums in float32"
    blocks = 1024 * (dims.iL * dims.jL * dims.a + dims.b * dims.iR * dims.jR) * 4
    assert masked - only_x >= 0.5 * blocks, "also of experts without rows"


@pytest.mark.parametrize("name", ["cpu-generic", "cpu-avx512-bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_prediction_is_finite_and_grows_with_rows(name: str, dtype: torch.dtype) -> None:
    for shape in ("light_16", "paper_16", "separable"):
        for phase in PHASES:
            for plan in contractions(dims_of(shape), EXPERTS, 64, dtype, phase):
                if plan.strategy not in IMPLEMENTED[phase]:
                    continue
                few = cost._seconds(plan, HARDWARE[name])
                many = contraction(plan.strategy, plan.dims, EXPERTS, 4096, dtype, phase)
                none = contraction(plan.strategy, plan.dims, EXPERTS, 0, dtype, phase)
                assert 0 < cost._seconds(none, HARDWARE[name]) < few < cost._seconds(many, HARDWARE[name]) < 1
