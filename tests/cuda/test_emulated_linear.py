"""Every strategy of the grouped product on the CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import relative_error

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.cuda.contractions import CudaLaunches
from mpoe_kernels.linear.gpu.operands import activations, block, scratch
from mpoe_kernels.linear.gpu.primitives import Rows, Sum
from tests.cases import SMALL_SHAPES
from tests.linear_problem import planned_strategies
from tests.linear_scenarios import LinearScenarios

from .emulated_linear import ALL, Case
from .emulation import OPS, REFUSED, SCHEDULES, Schedule, schedule, stats

PAIRS = [(name, strategy) for name, shape in SMALL_SHAPES.items() for strategy in planned_strategies(shape)]
IN_BFLOAT16 = ("paper", "light", "separable", "padded", "uneven_bonds")
MASKED = [True, True, False, True, True]
# Sizes that are multiples of 16 bytes: asynchronous copies, several tiles, several steps of every pipeline.
WIDE = {
    "light": MPOShape((8, 2, 8), (4, 3, 8)),
    "bond_24": MPOShape((16, 8), (8, 16), max_bond=24, central=1),
    "separable": MPOShape((16, 16, 1), (1, 16, 16)),
}


@pytest.mark.parametrize(("name", "strategy"), PAIRS)
def test_float32(name: str, strategy: str) -> None:
    Case(SMALL_SHAPES[name]).check(strategy)


@pytest.mark.parametrize(("name", "strategy"), [pair for pair in PAIRS if pair[0] in IN_BFLOAT16])
def test_bfloat16(name: str, strategy: str) -> None:
    Case(SMALL_SHAPES[name], torch.bfloat16).check(strategy)


@pytest.mark.parametrize("name", ["light", "separable"])
def test_float16(name: str) -> None:
    for strategy in planned_strategies(SMALL_SHAPES[name]):
        Case(SMALL_SHAPES[name], torch.float16).check(strategy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_asynchronous_copies(name: str, dtype: torch.dtype) -> None:
    case = Case(WIDE[name], dtype, tokens=48, experts=2, capacity=None, activation="relu")
    for strategy in planned_strategies(case.shape):
        stats()
        case.check(strategy)
        counted = stats()
        assert counted["cp_async"] > 0
        # Rows of a tile start in different banks: four wavefronts per load of four matrices.
        assert counted["wavefronts"] == 4 * counted["ldmatrix"]
        assert (counted["ldmatrix"] > 0) == (dtype != torch.float32)


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_schedules(timing: Schedule, dtype: torch.dtype) -> None:
    with schedule(*timing):
        for name in ("light", "separable"):
            strategy = planned_strategies(WIDE[name])[-1]
            Case(WIDE[name], dtype, tokens=40, experts=2).check(strategy)
            Case(SMALL_SHAPES[name], dtype).check("rebuild")


def test_random_schedule() -> None:
    for seed in range(3):
        with schedule("random", "lazy", seed):
            Case(SMALL_SHAPES["light"], torch.bfloat16).check("half_right")


@pytest.mark.parametrize("experts", [32, 33, 70])
@pytest.mark.parametrize("capacity", [None, 1])
def test_tiles_find_their_expert_among_many(experts: int, capacity: int | None) -> None:
    """A warp looks at 32 experts at a time; some have no slots, and with a capacity some slots have no expert."""
    case = Case(SMALL_SHAPES["separable"], torch.bfloat16, tokens=60, experts=experts, capacity=capacity)
    for strategy in ("separable", "rebuild"):
        case.check(strategy)


def test_large_tiles() -> None:
    """One block computes 128 x 128 results."""
    shape = MPOShape((16, 16), (16, 16), max_bond=32, central=1)
    case = Case(shape, torch.bfloat16, tokens=150, experts=1, top_k=1, capacity=None, activation="none")
    case.check("rebuild")


class TestScenarios(LinearScenarios):
    problem = Case


@pytest.mark.parametrize("name", ["light", "separable"])
def test_each_gradient_alone_and_the_masked_central_core(name: str) -> None:
    case = Case(SMALL_SHAPES[name])
    for strategy in planned_strategies(case.shape):
        together = case.run(strategy)
        for needed in range(5):
            alone = case.run(strategy, need=[k == needed for k in range(5)])
            assert torch.equal(alone[1 + needed], together[1 + needed])
        stats()
        case.run(strategy)
        complete = stats()["launches"]
        masked = case.run(strategy, need=MASKED)
        assert stats()["launches"] < complete  # not computed and then discarded
        assert all(torch.equal(masked[k], together[k]) for k in (0, 1, 2, 4, 5))


def test_bias_and_activation_need_no_launch_of_their_own() -> None:
    """A separable forward is one launch per block, whatever follows the last product or is saved."""
    plain = Case(SMALL_SHAPES["separable"], activation="none", with_bias=False)
    complete = Case(SMALL_SHAPES["separable"], activation="gelu")
    for case in (plain, complete):
        stats()
        case.linear.forward("separable")
        assert stats()["launches"] == 3


def test_without_saved_central_rows() -> None:
    """After a forward that saved nothing, a separable backward recomputes what it reads."""
    case = Case(SMALL_SHAPES["separable"], activation="none")
    y, h, _ = case.linear.forward("separable")
    with_h = case.linear.backward("separable", case.grad, h, None, ALL)
    without = case.linear.backward("separable", case.grad, None, None, ALL)
    assert all(torch.equal(p, q) for p, q in zip(with_h, without, strict=True))
    assert torch.equal(y, case.linear.forward("separable", save=False)[0])


def test_the_same_bits_every_time_and_on_every_schedule() -> None:
    for strategy in ("rebuild", "half_left", "chain"):
        case = Case(SMALL_SHAPES["paper"])
        first = case.run(strategy)
        with schedule("descending", "eager"):
            second = case.run(strategy)
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_tf32_is_less_exact_and_only_on_demand() -> None:
    errors = []
    for tf32 in (False, True):
        torch.manual_seed(0)
        case = Case(WIDE["light"], tokens=20, activation="none", tf32=tf32)
        errors.append(relative_error(case.run("rebuild")[0], case.reference(torch.float64)[0]))
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 2e-3


def test_the_budget_of_many_experts_saves_launches() -> None:
    launched = []
    for experts in (8, 64):
        case = Case(WIDE["light"], torch.bfloat16, tokens=64, experts=experts)
        stats()
        case.linear.forward("rebuild")
        launched.append(stats()["launches"])
    assert launched[1] <= 2 * launched[0]  # eight times the experts


@pytest.mark.parametrize(
    ("change", "message"),
    [("sizes", "8 axes; got 7"), ("layout", "3 operands has 30 numbers; got 29"), ("dtype", "the dtype of x")],
)
def test_a_contraction_with_wrong_operands_is_refused(change: str, message: str) -> None:
    case, calls = Case(SMALL_SHAPES["light"], tokens=4), []
    dims, rows = case.linear.dims, case.linear.x
    y = rows.new_empty(rows.shape[0], dims.out_features)
    x, out = activations(rows, ("iL", "iC", "iR"), dims), activations(y, ("jL", "jC", "jR"), dims)
    note = SimpleNamespace(rows_times_block=lambda *call: calls.append(call))
    CudaLaunches(note).rows(Rows(x, scratch("W", 2, dims, rows), out, dims, case.routing.expert_offsets))
    ((first, second, result, layout, sizes, *rest),) = calls
    wrong = {
        "sizes": (first, second, result, layout, sizes[1:]),
        "layout": (first, second, result, layout[1:], sizes),
        "dtype": (first, second.double(), result, layout, sizes),
    }[change]
    with pytest.raises(REFUSED, match=message):
        OPS.rows_times_block(*wrong, *rest)


def test_sums_over_experts_are_float32() -> None:
    case = Case(SMALL_SHAPES["light"], torch.bfloat16, tokens=4)
    dims, (left, central, _) = case.linear.dims, case.blocks
    half, out = scratch("LC", left.shape[0], dims, left), block(torch.zeros_like(central), "C")
    launch = Sum(block(left, "L"), half, out, dims, case.routing.expert_offsets)
    with pytest.raises(REFUSED, match="must have the dtype of x; sums over experts are float32"):
        CudaLaunches(OPS).merge(launch)


@settings(max_examples=25)
@given(st.data())
def test_any_small_shape(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    factors = st.lists(st.integers(1, 4), min_size=count, max_size=count)
    shape = MPOShape(
        tuple(data.draw(factors)),
        tuple(data.draw(factors)),
        central=data.draw(st.integers(0, count - 1)),
        max_bond=data.draw(st.sampled_from([None, 1, 2, 5])),
    )
    strategy = data.draw(st.sampled_from(planned_strategies(shape)))
    experts = data.draw(st.integers(1, 4))
    Case(
        shape,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        tokens=data.draw(st.integers(0, 9)),
        experts=experts,
        top_k=data.draw(st.integers(1, min(2, experts))),
        capacity=data.draw(st.sampled_from([None, 2])),
        activation=data.draw(st.sampled_from(["none", "silu"])),
    ).check(strategy, factor=3)
