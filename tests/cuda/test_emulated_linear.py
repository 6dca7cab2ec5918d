"""Every strategy by the CUDA kernels, forward and backward, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe_kernels import MPOShape
from mpoe_kernels.linear import gradients, grouped
from tests.assertions import assert_calibrated
from tests.cases import SMALL_SHAPES, pairwise
from tests.linear_problem import NAMES, planned_strategies
from tests.linear_scenarios import LinearScenarios

from .emulated_linear import ALL, Case
from .emulation import OPS, REFUSED, SCHEDULE_PARTS, library, schedule, stats

IN_BFLOAT16 = ("paper", "light", "separable", "padded", "uneven_bonds")
MASKED = [True, True, False, True, True]
# Sizes that are multiples of 16 bytes: asynchronous copies, several tiles, several steps of every pipeline.
WIDE = {
    "light": MPOShape((8, 2, 8), (4, 3, 8)),
    "bond_24": MPOShape((16, 8), (8, 16), max_bond=24, central=1),
    "separable": MPOShape((16, 16, 1), (1, 16, 16)),
    "bond_72": MPOShape((16, 8), (16, 8), max_bond=72, central=1),  # more than are summed at once
    "runs": MPOShape((2, 2, 80), (2, 2, 96), max_bond=16, central=1),  # digits of right in several tiles
}


# Products of several tiles, in whole chunks of 16 bytes and in odd ones; blocks of one tile and of several.
SEPARABLE = {
    "chunks": MPOShape((16, 16, 1), (1, 16, 16)),
    "other_chunks": MPOShape((16, 8, 1), (1, 16, 24)),
    "odd": MPOShape((6, 5, 1), (1, 7, 9)),
    "several_tiles": MPOShape((72, 3, 1), (1, 5, 70)),
}
PRODUCTS = [
    pytest.param(name, strategy, marks=[] if name in ("light", "separable") else pytest.mark.exhaustive)
    for name, shape in SMALL_SHAPES.items()
    for strategy in planned_strategies(shape)
    if strategy != "rebuild"
]


@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_float32(name: str) -> None:
    Case(SMALL_SHAPES[name]).check("rebuild")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "strategy"), PRODUCTS)
def test_product_by_product(name: str, strategy: str, dtype: torch.dtype) -> None:
    Case(SMALL_SHAPES[name], dtype).check(strategy)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("name", "dtype"), pairwise(list(SEPARABLE), [torch.float32, torch.bfloat16, torch.float16]))
def test_separable(name: str, dtype: torch.dtype, mirrored: bool) -> None:
    """Several tiles and parts of an expert's rows, an expert without, slots without an expert."""
    shape = SEPARABLE[name].mirrored() if mirrored else SEPARABLE[name]
    given = {"tokens": 90, "experts": 4, "top_k": 2, "kind": "some_idle", "capacity": 50}
    for with_bias in (True, False):
        case = Case(shape, dtype, **given, activation="relu", with_bias=with_bias)
        assert case.filled < 180
        assert not case.routing.expert_load.all()
        case.check("separable")


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_one_reading_of_rows_gives_both_gradients(activation: str) -> None:
    """Of two launches less than without; float32 has none such."""
    launches = []
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(SMALL_SHAPES["separable"], dtype, with_bias=False, activation=activation)
        case.check("separable")
        _, h, z = case.linear.forward("separable")
        stats()
        case.linear.backward(case.grad, h, z, [*ALL[:4], False], case.slot_of_token, "separable")
        launches.append(stats()["launches"])
    assert launches[1] < launches[0]


def test_blocks_that_are_too_large_for_one_reading_are_refused() -> None:
    library()
    rows, grads, offsets = torch.zeros(3, 1, 65), torch.zeros(3, 1, 4), torch.tensor([0, 3], dtype=torch.int32)
    blocks, out = torch.zeros(1, 65, 4), torch.zeros(1, 1, 65, 4)
    with pytest.raises(REFUSED, match="at most 64 columns"):
        OPS.grouped_blocks(rows, grads, blocks, out, torch.zeros_like(rows), None, offsets, None, False, "none")


@pytest.mark.parametrize("name", IN_BFLOAT16)
def test_bfloat16(name: str) -> None:
    Case(SMALL_SHAPES[name], torch.bfloat16).check("rebuild")


@pytest.mark.parametrize("name", ["light", "separable"])
def test_float16(name: str) -> None:
    Case(SMALL_SHAPES[name], torch.float16).check("rebuild")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_asynchronous_copies(name: str, dtype: torch.dtype) -> None:
    case = Case(WIDE[name], dtype, tokens=48, experts=2, capacity=None, activation="relu")
    stats()
    case.check("rebuild")
    counted = stats()
    assert counted["cp_async"] > 0
    # Rows of a tile start in different banks: four wavefronts per load of four matrices.
    assert counted["wavefronts"] == 4 * counted["ldmatrix"]
    assert (counted["ldmatrix"] > 0) == (dtype != torch.float32)


@pytest.mark.parametrize(("order", "copies", "dtype"), pairwise(*SCHEDULE_PARTS, [torch.float32, torch.bfloat16]))
def test_schedules(order: str, copies: str, dtype: torch.dtype) -> None:
    with schedule(order, copies):
        for name, strategy in (("light", "rebuild"), ("separable", "separable")):
            Case(WIDE[name], dtype, tokens=40, experts=2).check(strategy)
            Case(SMALL_SHAPES[name], dtype).check(strategy)


def test_random_schedule() -> None:
    for seed in range(3):
        with schedule("random", "lazy", seed):
            Case(SMALL_SHAPES["light"], torch.bfloat16).check("rebuild")


@pytest.mark.parametrize("columns", [64, 128])
def test_rows_in_several_tiles(columns: int) -> None:
    """One block computes 128 rows and either number of columns."""
    shape = MPOShape((16, 16), (16, columns // 8), max_bond=32, central=1)
    case = Case(shape, torch.bfloat16, tokens=150, experts=1, top_k=1, capacity=None, activation="none")
    case.check("rebuild")


class TestScenarios(LinearScenarios):
    problem = Case


@pytest.mark.parametrize("name", ["light", "separable"])
def test_each_gradient_alone_and_the_masked_central_core(name: str) -> None:
    case = Case(SMALL_SHAPES[name])
    stats()
    together = case.run("rebuild")
    complete = stats()["launches"]
    for needed in range(5):
        alone = case.run("rebuild", need=[k == needed for k in range(5)])
        assert torch.equal(alone[1 + needed], together[1 + needed])
        assert stats()["launches"] < complete  # not computed and then discarded
    masked = case.run("rebuild", need=MASKED)
    assert all(torch.equal(masked[k], together[k]) for k in (0, 1, 2, 4, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_of_separable_alone(dtype: torch.dtype) -> None:
    """Against float64, not bit for bit: other products run than for all gradients. Masked: without the central one."""
    case = Case(SMALL_SHAPES["separable"], dtype, with_bias=False)
    truth, same = (case.reference(kind) for kind in (torch.float64, dtype))
    stats()
    case.run("separable")
    complete = stats()["launches"]
    for wanted in (*({k} for k in range(4)), {0, 1, 3}):
        found = case.run("separable", need=[k in wanted for k in range(5)])
        assert stats()["launches"] <= complete
        for k in wanted:
            assert_calibrated(found[1 + k], truth[1 + k], same[1 + k], NAMES[1 + k])


def test_launches() -> None:
    """Fused forward one, whatever follows the product or is saved; backward one for x, left and central, and right
    each. Of a separable one two, besides the library's; backward three for x, left and right, two if one reads."""
    case = Case(WIDE["light"], experts=2, activation="gelu", gathered=False)
    stats()
    _, h, z = case.linear.forward()
    assert stats()["launches"] == 1
    case.linear.backward(case.grad, h, z, ALL)
    assert stats()["launches"] == 3
    case = Case(WIDE["separable"], torch.bfloat16, experts=2, activation="relu", gathered=False, with_bias=False)
    stats()
    y, h, _ = case.linear.forward("separable")
    assert stats()["launches"] == 2
    case.linear.backward(case.grad, h, y, [*ALL[:4], False], strategy="separable")
    assert stats()["launches"] == 2


def test_experts_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gradients, grouped):
        monkeypatch.setattr(module, "experts_at_once", lambda *_, **__: 2)
    Case(SMALL_SHAPES["padded"]).check("rebuild")
    Case(SMALL_SHAPES["padded"], activation="silu").check("half_left")


def test_a_nan_row_stays_its_token_s() -> None:
    """Beside other rows of its expert, in one tile; in x and in the gradient of y."""
    case = Case(SMALL_SHAPES["paper"], tokens=9, experts=2, top_k=1, capacity=None, activation="silu")
    case.linear.x[3] = torch.nan
    slot = int(case.slot_of_token[3, 0])
    y, h, z = case.linear.forward()
    assert y[slot].isnan().all()
    assert y[[s for s in range(9) if s != slot]].isfinite().all()
    dx = case.linear.backward(case.grad, h, z, [True, *[False] * 4], case.slot_of_token)[0]
    assert dx[[t for t in range(9) if t != 3]].isfinite().all()


@pytest.mark.parametrize("name", ["separable", "separable_mirrored"])
def test_a_nan_row_spoils_no_other_row_and_no_other_expert_s_block(name: str) -> None:
    case = Case(SMALL_SHAPES[name], torch.bfloat16, 9, 2, 1, "uniform", None, activation="relu", with_bias=False)
    slot, owner, other = int(case.routing.expert_offsets[1]), 1, 0
    token = int(case.routing.token_of_slot[slot])
    clean = case.run("separable")
    case.x[token] = torch.nan
    y, dx, dleft, dcentral, dright = case.run("separable")
    slots, tokens = (torch.arange(9) != own for own in (slot, token))
    assert torch.equal(y[slots], clean[0][slots])
    assert torch.equal(dx[tokens], clean[1][tokens])
    for found, wanted in ((dleft, clean[2]), (dright, clean[4])):
        assert torch.equal(found[other], wanted[other])
        assert found[owner].isnan().any()
    assert dcentral.isnan().any()


def test_the_same_bits_every_time_and_on_every_schedule() -> None:
    for name, strategy in (("paper", "rebuild"), ("separable", "separable")):
        case = Case(SMALL_SHAPES[name], torch.bfloat16, with_bias=False)
        first = case.run(strategy)
        with schedule("descending", "eager"):
            second = case.run(strategy)
        assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


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
    experts = data.draw(st.integers(1, 4))
    Case(
        shape,
        data.draw(st.sampled_from([torch.float32, torch.bfloat16])),
        tokens=data.draw(st.integers(0, 9)),
        experts=experts,
        top_k=data.draw(st.integers(1, min(2, experts))),
        capacity=data.draw(st.sampled_from([None, 2])),
        activation=data.draw(st.sampled_from(["none", "silu"])),
    ).check("rebuild", factor=3)
