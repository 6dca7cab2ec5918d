"""Gate, route, dispatch, combine and their gradients on the emulated CUDA kernels, against the reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from emulation import DTYPES, SCHEDULES, Schedule, call, nan, pointer, schedule, stats
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpoe_kernels import Routing
from mpoe_kernels.reference import combine_reference, dispatch_reference, route_reference
from mpoe_kernels.testing.assertions import assert_calibrated
from mpoe_kernels.testing.cases import expert_choice

FLOATS = list(DTYPES)


def at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(pointer(tensor))


def gate(logits: Tensor, top_k: int, renormalize: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    probabilities, weights = nan(tokens, experts, dtype=torch.float32), nan(tokens, top_k, dtype=torch.float32)
    index = torch.full((tokens, top_k), -7)
    arguments = (at(logits), at(probabilities), at(weights), at(index), tokens, experts, top_k, int(renormalize))
    call("mpoe_emu_gate", DTYPES[logits.dtype], *arguments)
    return probabilities, weights, index


def route(index: Tensor, experts: int, capacity: int | None = None, mask: Tensor | None = None) -> Routing:
    tokens, top_k = index.shape
    offsets = torch.full((experts + 1,), -7, dtype=torch.int32)
    token_of_slot, slot_of_token = torch.full((tokens * top_k,), -7), torch.full((tokens, top_k), -7)
    limit = -1 if capacity is None else capacity
    results = (at(offsets), at(token_of_slot), at(slot_of_token))
    call("mpoe_emu_route", at(index), at(mask), tokens, top_k, experts, limit, *results)
    return Routing(offsets, token_of_slot, slot_of_token)


def check_route(index: Tensor, experts: int, capacity: int | None = None, mask: Tensor | None = None) -> Routing:
    found = route(index, experts, capacity, mask)
    expected = route_reference(index, experts, capacity, mask)
    for actual, truth in zip((found.expert_offsets, found.token_of_slot, found.slot_of_token), expected, strict=True):
        assert torch.equal(actual, truth)
    return found


# ------------------------------------------------------------------ gate


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (7, 8, 2), (33, 64, 4), (5, 100, 100)])
def test_gate(dtype: torch.dtype, tokens: int, experts: int, top_k: int) -> None:
    logits = (3 * torch.randn(tokens, experts)).to(dtype)
    for renormalize in (False, True):
        probabilities, weights, index = gate(logits, top_k, renormalize)
        truth = logits.double().softmax(1)
        assert_calibrated(probabilities, truth, logits.float().softmax(1))
        order = logits.double().sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        assert torch.equal(index, order)
        chosen, same = truth.gather(1, order), logits.float().softmax(1).gather(1, order)
        if renormalize:
            chosen, same = chosen / chosen.sum(1, keepdim=True), same / same.sum(1, keepdim=True)
        assert_calibrated(weights, chosen, same, factor=4)


def test_gate_of_equal_infinite_and_missing_logits() -> None:
    equal = torch.zeros(1, 40)
    assert gate(equal, 3)[2].tolist() == [[0, 1, 2]]
    impossible = torch.full((1, 6), -float("inf"))
    impossible[0, 4] = 1.0
    assert gate(impossible, 3)[2].tolist() == [[4, 0, 1]]
    assert gate(impossible, 1)[1].tolist() == [[1.0]]
    unknown = torch.full((1, 5), float("nan"))
    assert gate(unknown, 2)[2].tolist() == [[0, 1]]  # a valid expert whatever the logits hold


def test_gate_refuses_more_choices_than_experts() -> None:
    with pytest.raises(RuntimeError, match="top_k"):
        gate(torch.zeros(2, 3), 4)


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
    with pytest.raises(RuntimeError, match="at most 4096 experts"):
        route(torch.zeros(1, 1, dtype=torch.int64), 5000)


@pytest.mark.parametrize("tokens", [40, 1200])
def test_indices_out_of_range_count_as_masked(tokens: int) -> None:
    """The op does not check them, as that would wait for the device; memory must stay intact."""
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


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 16, 520, 1040])
def test_dispatch(dtype: torch.dtype, columns: int) -> None:
    routing = check_route(expert_choice("zipf", 9, 4, 2), 4, capacity=3)
    wide = torch.randn(9, columns + 8).to(dtype)
    for x, stride in ((wide[:, :columns].contiguous(), columns), (wide, columns + 8)):
        out = nan(18, columns, dtype=dtype)
        filled = routing.expert_offsets[-1:].clone()
        arguments = (at(x), ctypes.c_int64(stride), at(routing.token_of_slot), at(filled), at(out), 18, columns)
        call("mpoe_emu_dispatch", DTYPES[dtype], *arguments)
        assert torch.equal(out, dispatch_reference(x[:, :columns], routing))


def combine(rows: Tensor, routing: Routing, gates: Tensor | None) -> Tensor:
    tokens, top_k = routing.slot_of_token.shape
    out = nan(tokens, rows.shape[1], dtype=rows.dtype)
    arguments = (at(rows), at(routing.slot_of_token), at(gates), at(out), tokens, top_k, rows.shape[1])
    call("mpoe_emu_combine", DTYPES[rows.dtype], *arguments)
    return out


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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

    drows, dgates = nan(18, columns, dtype=dtype), nan(9, 2, dtype=torch.float32)

    def backward(to_rows: Tensor | None, to_gates: Tensor | None) -> None:
        slots = (at(routing.token_of_slot), at(routing.slot_of_token), at(gates))
        sizes = (18, 2, columns)
        arguments = (at(grad), at(rows), *slots, at(to_rows), at(to_gates), *sizes)
        call("mpoe_emu_combine_backward", DTYPES[dtype], *arguments)

    backward(drows, dgates)
    found = [combine(rows, routing, gates), combine(rows, routing, None), drows, dgates]
    truth, same = reference(torch.float64), reference(dtype)
    same[3] = reference(torch.float32)[3]  # gates have float32 gradients
    for name, a, t, s in zip(("out", "ones", "drows", "dgates"), found, truth, same, strict=True):
        assert_calibrated(a, t.detach(), s.detach(), name)
    alone = torch.full_like(drows, float("nan"))
    backward(alone, None)
    assert torch.equal(alone, drows)
    gates_alone = torch.full_like(dgates, float("nan"))
    backward(None, gates_alone)
    assert torch.equal(gates_alone, dgates)
