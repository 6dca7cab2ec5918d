"""The weight-stationary kernel: weights rebuilt in shared memory, forward and transposed, on every kind of shape."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from mpoe_bench.cases import relative_error, workload_shape

from mpoe_kernels import MPOShape
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.cuda.panels import Panel, best_panel
from mpoe_kernels.linear.cuda.panels import panel_bytes as predicted_bytes
from mpoe_kernels.triton.architecture import SHARED_MEMORY
from tests.cases import SMALL_SHAPES, pairwise

from .emulated_linear import ALL, Case
from .emulation import REFUSED, SCHEDULE_PARTS, limits, panel_bytes, schedule, stats

# Sizes that are multiples of 16 bytes: asynchronous copies, several tiles, several steps of every pipeline.
BOND_24 = MPOShape((16, 8), (8, 16), max_bond=24, central=1)
LIGHT = MPOShape((8, 2, 8), (4, 3, 8))
WIDE = MPOShape((8, 2, 4), (8, 3, 8))  # panels of 96 columns and more


def smallest(size: int) -> int:
    """Smallest prime factor: gives several panels, each of more than one index."""
    return next((d for d in range(2, size + 1) if size % d == 0), 1)


def whole(dims: BlockDims, transposed: bool) -> tuple[int, int, int]:
    return (dims.iL, dims.iC, dims.iR) if transposed else (dims.jL, dims.jC, dims.jR)


def cut(dims: BlockDims, transposed: bool, left_first: bool, split: bool) -> Panel:
    kept = whole(dims, transposed)
    if split:
        kept = tuple(map(smallest, kept))
    return Panel(*kept, left_first, 0)


def check(case: Case, left_first: bool, split: bool = False) -> None:
    dims = case.linear.dims
    case.check(cut(dims, False, left_first, split), cut(dims, True, left_first, split))


@pytest.mark.parametrize("left_first", [True, False])
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_float32(name: str, left_first: bool) -> None:
    check(Case(SMALL_SHAPES[name]), left_first, split=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["paper", "light", "separable", "padded", "uneven_bonds"])
def test_sixteen_bits(name: str, dtype: torch.dtype) -> None:
    for left_first in (True, False):
        check(Case(SMALL_SHAPES[name], dtype), left_first)
        check(Case(SMALL_SHAPES[name], dtype), left_first, split=True)


@pytest.mark.parametrize(
    ("shape", "left_first", "dtype"), pairwise([BOND_24, LIGHT], [True, False], [torch.float32, torch.bfloat16])
)
def test_asynchronous_copies(shape: MPOShape, left_first: bool, dtype: torch.dtype) -> None:
    case = Case(shape, dtype, tokens=48, experts=2, capacity=None, activation="relu")
    dims = case.linear.dims
    stats()
    case.check(cut(dims, False, left_first, split=True), cut(dims, True, left_first, split=True))
    counted = stats()
    assert counted["cp_async"] > 0
    # Rows of a tile start in different banks: four wavefronts per load of four matrices.
    assert counted["wavefronts"] == 4 * counted["ldmatrix"]
    assert (counted["ldmatrix"] > 0) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("left_first", [True, False])
def test_wide_panels(left_first: bool, dtype: torch.dtype) -> None:
    """More than 64 columns take 256 threads."""
    case = Case(WIDE, dtype, tokens=150, experts=2, top_k=1, capacity=None)
    panel = Panel(4, 3, 8, left_first, 0)
    assert case.linear.dims.jL % 4 == 0
    y, _, _ = case.linear.forward(panel)
    truth, same = case.reference(torch.float64)[0], case.reference(dtype)[0]
    assert relative_error(y, truth) <= 2 * relative_error(same, truth)


@pytest.mark.parametrize(("order", "copies", "dtype"), pairwise(*SCHEDULE_PARTS, [torch.float32, torch.bfloat16]))
def test_schedules(order: str, copies: str, dtype: torch.dtype) -> None:
    with schedule(order, copies):
        for left_first in (True, False):
            check(Case(LIGHT, dtype, tokens=40, experts=2), left_first, split=True)
            check(Case(SMALL_SHAPES["light"], dtype), left_first)


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gathered", [False, True])
def test_activations_with_and_without_gather(activation: str, gathered: bool) -> None:
    check(Case(SMALL_SHAPES["light"], activation=activation, gathered=gathered, with_bias=False), True)
    check(Case(SMALL_SHAPES["padded"], activation=activation, gathered=gathered), False)


@pytest.mark.parametrize("kind", ["all_to_one", "some_idle"])
def test_distributions(kind: str) -> None:
    check(Case(SMALL_SHAPES["light"], tokens=30, experts=4, kind=kind, capacity=None), True, split=True)


def test_rows_of_one_expert_are_shared_by_several_blocks() -> None:
    """More rows than one block must take, and fewer panels than multiprocessors."""
    for dtype in (torch.float32, torch.bfloat16):
        check(
            Case(SMALL_SHAPES["light"], dtype, tokens=200, experts=2, kind="all_to_one", top_k=1, capacity=None), True
        )


def test_no_tokens() -> None:
    check(Case(SMALL_SHAPES["light"], tokens=0, top_k=1), True)


def test_one_launch() -> None:
    case = Case(LIGHT, torch.bfloat16, tokens=20)
    stats()
    case.linear.forward(cut(case.linear.dims, False, True, split=True))
    assert stats()["launches"] == 1


def test_masked_and_single_gradients() -> None:
    case = Case(SMALL_SHAPES["light"])
    dims = case.linear.dims
    forward, backward = cut(dims, False, True, True), cut(dims, True, True, True)
    together = case.run(forward, backward)
    for needed in range(5):
        alone = case.run(forward, backward, [k == needed for k in range(5)])
        assert torch.equal(alone[1 + needed], together[1 + needed])
    masked = case.run(forward, backward, [True, True, False, True, True])
    assert masked[3] is None
    assert all(torch.equal(masked[k], together[k]) for k in (0, 1, 2, 4, 5))


def test_the_same_bits_on_every_schedule() -> None:
    case = Case(SMALL_SHAPES["paper"], torch.bfloat16)
    dims = case.linear.dims
    first = case.run(cut(dims, False, True, True), cut(dims, True, True, True), ALL)
    with schedule("descending", "eager"):
        second = case.run(cut(dims, False, True, True), cut(dims, True, True, True), ALL)
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_tf32_is_less_exact_and_only_on_demand() -> None:
    errors = []
    for tf32 in (False, True):
        torch.manual_seed(0)
        case = Case(LIGHT, tokens=20, activation="none", tf32=tf32)
        y = case.linear.forward(cut(case.linear.dims, False, True, split=True))[0]
        errors.append(relative_error(y, case.reference(torch.float64)[0]))
    assert errors[0] < 1e-6
    assert 1e-5 < errors[1] < 2e-3


@pytest.mark.parametrize("left", [3, 0])
def test_panels_that_do_not_divide_the_axes_are_refused(left: int) -> None:
    with pytest.raises(REFUSED, match="does not divide"):
        Case(LIGHT, tokens=4).linear.forward(Panel(left, 1, 1, True, 0))


def test_panels_that_do_not_fit_are_refused() -> None:
    case = Case(SMALL_SHAPES["light"], tokens=4)
    with limits(shared_bytes=1024), pytest.raises(REFUSED, match="bytes of shared memory; the device has 1024"):
        case.linear.forward(cut(case.linear.dims, False, True, split=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", ["paper_full", "paper_64", "paper_16", "light_64", "separable"])
def test_chosen_panels_fit_and_need_what_was_said(name: str, architecture: str, dtype: torch.dtype) -> None:
    limit = SHARED_MEMORY[architecture]
    for up, transposed in product((True, False), (False, True)):
        shape = workload_shape(name, 768, 3072)
        dims = BlockDims.of_shape(shape if up else shape.mirrored())
        panel = best_panel(dims, transposed, dtype.itemsize, limit)
        if panel is None:
            continue
        needed = panel_bytes(dims, dtype, transposed, panel)
        assert panel.shared_bytes == needed <= limit
        assert predicted_bytes(dims, panel.sizes, panel.left_first, transposed, dtype.itemsize) == needed
        smaller = best_panel(dims, transposed, dtype.itemsize, needed - 1)
        assert smaller is None or math.prod(smaller.sizes) <= math.prod(panel.sizes)
