"""Few rows in one launch, with slots sorted by expert or naming their expert, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoe_kernels import MPOShape
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.cuda.few import Few, best_few
from mpoe_kernels.linear.cuda.few import few_bytes as predicted_bytes
from mpoe_kernels.testing.assertions import assert_calibrated
from mpoe_kernels.testing.cases import SMALL_SHAPES, workload_shape
from mpoe_kernels.triton.hardware import HARDWARE

from .emulated_linear import Case
from .emulation import REFUSED, SCHEDULES, Schedule, few, few_bytes, limits, schedule, stats


def smallest(size: int) -> int:
    """Smallest prime factor: gives several blocks, each of more than one index."""
    return next((d for d in range(2, size + 1) if size % d == 0), 1)


def shape_of(case: Case, rows: int) -> tuple[int, int, int, int]:
    dims = case.linear.dims
    return smallest(dims.jL), smallest(dims.jC), smallest(dims.jR), rows


def few_of(left: int, centre: int, right: int, rows: int) -> Few:
    return Few(left, centre, right, rows, 0, 0.0)


def check(case: Case, cut: tuple[int, int, int, int] | None = None) -> Tensor:
    few = few_of(*(cut or shape_of(case, 3)))
    y, _, saved = case.linear.forward(few)
    assert_calibrated(y, case.reference(torch.float64)[0], case.reference(case.dtype)[0], f"y ({few})")
    filled = int(case.routing.expert_offsets[-1])
    assert bool((y[filled:] == 0).all())
    if saved is not None:
        before = case.reference(torch.float64, activation="none")[0]
        assert_calibrated(saved, before, case.reference(case.dtype, activation="none")[0], "pre-activation")
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SMALL_SHAPES)
def test_every_shape(name: str, dtype: torch.dtype) -> None:
    check(Case(SMALL_SHAPES[name], dtype))


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
def test_schedules(timing: Schedule) -> None:
    with schedule(*timing):
        for name in ("light", "separable", "paper"):
            check(Case(SMALL_SHAPES[name], torch.bfloat16))


@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("gathered", [False, True])
def test_activations_with_and_without_gather(activation: str, gathered: bool) -> None:
    check(Case(SMALL_SHAPES["light"], activation=activation, gathered=gathered, with_bias=gathered))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sixteen_bytes_at_a_time(dtype: torch.dtype) -> None:
    """Sizes that are multiples of 16 bytes, and more columns than 128 threads load at once."""
    case = Case(MPOShape((4, 1, 4), (4, 40, 4)), dtype, tokens=9, experts=4, capacity=None)
    check(case, (1, 40, 4, 16))


@pytest.mark.parametrize("kind", ["all_to_one", "some_idle"])
def test_distributions(kind: str) -> None:
    check(Case(SMALL_SHAPES["light"], kind=kind, experts=5))


def test_no_rows() -> None:
    check(Case(SMALL_SHAPES["light"], tokens=0, top_k=1))


@pytest.mark.parametrize("name", ["light", "separable"])
def test_each_slot_names_its_expert(name: str) -> None:
    """Without routing: slots in any order, some without an expert."""
    case = Case(SMALL_SHAPES[name], capacity=None)
    sorted_y = check(case)
    offsets = case.routing.expert_offsets
    slots = sorted_y.shape[0]
    expert = torch.bucketize(torch.arange(slots), offsets[1:].long(), right=True)
    order = torch.randperm(slots)
    dropped = torch.arange(slots) % 4 == 3
    chosen = torch.where(dropped, -1, expert[order])
    y = few(case.linear, shape_of(case, 2), chosen, case.routing.token_of_slot[order])
    assert torch.equal(y, torch.where(dropped[:, None], 0, sorted_y[order]))


def test_one_launch_without_scratch_memory() -> None:
    case = Case(SMALL_SHAPES["paper"])
    stats()
    check(case)
    assert stats()["launches"] == 1


def test_what_does_not_fit_is_refused() -> None:
    case = Case(SMALL_SHAPES["separable"], tokens=2)
    for cut, message in ((few_of(1, 3, 1, 1), "does not divide jC"), (few_of(1, 1, 1, 0), "1 to 128")):
        with pytest.raises(REFUSED, match=message):
            case.linear.forward(cut)
    with limits(shared_bytes=1024), pytest.raises(REFUSED, match="the device has 1024"):
        case.linear.forward(few_of(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["paper_full", "paper_64", "paper_16", "light_64", "separable"])
def test_chosen_blocks_fit_and_need_what_was_predicted(name: str) -> None:
    hardware = HARDWARE["a100"]
    shape = workload_shape(name, 768, 3072)
    dims = BlockDims.of_shape(shape)
    for slots in (1, 8, 16):
        chosen = best_few(dims, 2, slots, hardware)
        assert chosen is not None
        assert chosen.shared_bytes == predicted_bytes(dims, chosen.left, chosen.centre, chosen.rows, 2)
        assert chosen.shared_bytes == few_bytes(dims, torch.bfloat16, chosen[:4]) < hardware.sram_bytes
    assert best_few(dims, 2, 17, hardware) is None
