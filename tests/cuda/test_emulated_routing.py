"""Route, dispatch, combine and their gradients on the emulated CUDA kernels, against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpoe_bench.cases import expert_choice
from torch import Tensor

from mpoe_kernels import Routing
from mpoe_kernels.reference import combine_reference, dispatch_reference, route_reference
from tests.assertions import assert_calibrated, poisoned_memory

from .emulation import DTYPES, OPS, REFUSED, SCHEDULES, Schedule, library, schedule, stats


@pytest.fixture(autouse=True)
def _loaded() -> None:
    library()


def route(index: Tensor, experts: int, capacity: int | None = None, mask: Tensor | None = None) -> Routing:
    with poisoned_memory():
        return Routing(*OPS.route(index, experts, capacity, mask))


def check_route(index: Tensor, experts: int, capacity: int | None = None, mask: Tensor | None = None) -> Routing:
    found = route(index, experts, capacity, mask)
    expected = route_reference(index, experts, capacity, mask)
    for actual, truth in zip((found.expert_offsets, found.token_of_slot, found.slot_of_token), expected, strict=True):
        assert torch.equal(actual, truth)
    return found


# ------------------------------------------------------------------ route


@pytest.mark.parametrize("timing", SCHEDULES, ids=lambda timing: "-".join(timing))
@pytest.mark.parametrize("capacity", [None, 30])
@pytest.mark.parametrize("tokens", [90, 700])  # in one launch, in several
def test_route(timing: Schedule, capacity: int | None, tokens: int) -> None:
    index = expert_choice("zipf", tokens, 10, 2)
    mask = torch.rand(tokens) > 0.2
    with schedule(*timing):
        stats()
        check_route(index, 10, capacity, mask)
        launches = stats()["launches"]
    assert launches == (1 if tokens == 90 else 3 if capacity is None else 6)


@pytest.mark.parametrize("kind", ["uniform", "all_to_one", "some_idle"])
def test_route_distributions(kind: str) -> None:
    for tokens in (1, 31, 513, 1100):
        check_route(expert_choice(kind, tokens, 5), 5)
        check_route(expert_choice(kind, tokens, 5, 2), 5, capacity=3)


def test_route_of_no_tokens() -> None:
    check_route(torch.zeros(0, 2, dtype=torch.int64), 3)
    check_route(torch.zeros(0, 2, dtype=torch.int64), 3, capacity=1)


def test_many_experts() -> None:
    for tokens in (20, 600):
        check_route(torch.randint(0, 300, (tokens, 2)), 300, capacity=2)
    with pytest.raises(REFUSED, match="at most 11999 experts; got 12000"):
        route(torch.zeros(1, 1, dtype=torch.int64), 12000)


@pytest.mark.parametrize("tokens", [40, 1200])
def test_indices_out_of_range_count_as_masked(tokens: int) -> None:
    """The op does not check them, because that would wait for the device; memory must stay intact."""
    index = torch.randint(0, 4, (tokens, 1))
    mask = torch.rand(tokens) > 0.3
    wild = torch.where(mask[:, None], index, torch.where(index > 1, -5, 4 << 40))
    expected, found = route(index, 4, mask=mask), route(wild, 4)
    assert torch.equal(found.expert_offsets, expected.expert_offsets)
    assert torch.equal(found.token_of_slot, expected.token_of_slot)
    assert torch.equal(found.slot_of_token, expected.slot_of_token)


@settings(max_examples=40)
@given(
    st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 1, 3]), st.booleans(), st.data()
)
def test_any_route(tokens: int, experts: int, top_k: int, capacity: int | None, masked: bool, data) -> None:
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, experts, (tokens, top_k), generator=generator)
    check_route(index, experts, capacity, torch.rand(tokens, generator=generator) > 0.5 if masked else None)


# ------------------------------------------------------------------ rows


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 520, 1040])
def test_dispatch(dtype: torch.dtype, columns: int) -> None:
    routing = check_route(expert_choice("zipf", 9, 4, 2), 4, capacity=3)
    wide = torch.randn(9, columns + 8).to(dtype)
    for x in (wide[:, :columns].contiguous(), wide[:, :columns], wide[:, 1 : columns + 1]):
        with poisoned_memory():
            out = OPS.combine(x, routing.token_of_slot[:, None], None, routing.expert_offsets[-1:])
        assert torch.equal(out, dispatch_reference(x, routing))


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 520])
@pytest.mark.parametrize("capacity", [None, 2])
def test_combine_and_its_gradients(dtype: torch.dtype, columns: int, capacity: int | None) -> None:
    routing = check_route(expert_choice("zipf", 9, 4, 2), 4, capacity, torch.arange(9) != 3)
    rows, grad = torch.randn(18, columns).to(dtype), torch.randn(9, columns).to(dtype)
    filled = int(routing.expert_offsets[-1])
    rows[filled:] = float("nan")  # empty slots: never read
    gates = torch.rand(9, 2)

    def reference(kind: torch.dtype) -> list[Tensor]:
        leaf, weights = rows.nan_to_num(0).to(kind).requires_grad_(), gates.to(kind).requires_grad_()
        out = combine_reference(leaf, routing, weights)
        ones = combine_reference(leaf, routing, torch.ones_like(weights))
        return [out, ones, *torch.autograd.grad(out, (leaf, weights), grad.to(kind))]

    def backward(to_rows: bool, to_gates: bool) -> tuple[Tensor, Tensor]:
        with poisoned_memory():
            return OPS.combine_backward(
                grad, rows, routing.token_of_slot, routing.slot_of_token, gates, to_rows, to_gates
            )

    drows, dgates = backward(True, True)
    with poisoned_memory():
        sums = [OPS.combine(rows, routing.slot_of_token, given, None) for given in (gates, None)]
    truth, same = reference(torch.float64), reference(dtype)
    same[3] = reference(torch.float32)[3]  # gates have float32 gradients
    for name, a, t, s in zip(("out", "ones", "drows", "dgates"), [*sums, drows, dgates], truth, same, strict=True):
        assert_calibrated(a, t.detach(), s.detach(), name)
    assert torch.equal(backward(True, False)[0], drows)
    assert torch.equal(backward(False, True)[1], dgates)
