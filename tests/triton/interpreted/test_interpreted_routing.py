"""Routing kernels against loops (integers: equal), dispatch and combine against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mpoe_kernels import route
from mpoe_kernels.routing import triton as routing
from mpoe_kernels.routing.gating import MOST_GATED, gating_of
from mpoe_kernels.routing.op import CombineBackwardCall
from tests.assertions import poisoned_memory
from tests.routing_problem import check_route, check_rows

CASES = [
    # tokens, experts, top_k, capacity, masked
    (0, 3, 2, None, False),
    (1, 1, 1, None, False),
    (9, 4, 2, 3, True),
    (40, 5, 3, None, True),
    (100, 6, 1, 12, True),
    (37, 5, 3, 4, False),
    (100, 70, 2, 2, True),
]


@pytest.mark.parametrize("few", [256, 0])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "capacity", "masked"), CASES)
def test_route_equals_loops(
    tokens: int, experts: int, top_k: int, capacity: int | None, masked: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "FEW", few)  # 0: several launches for any number of pairs
    monkeypatch.setattr(routing, "BLOCK", 32)
    monkeypatch.setattr(routing, "CHUNK", 4)
    monkeypatch.setattr(routing, "PART", 16)  # the last case counts its keys in 8 parts
    index = torch.randint(0, experts, (tokens, top_k))
    mask = torch.rand(tokens) > 0.3 if masked else None
    check_route(index, experts, capacity, mask, backend="triton")


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (1, 1, 1), (37, 5, 3), (3, 1000, 16)])
def test_gate(tokens: int, experts: int, top_k: int, raw: bool) -> None:
    logits = torch.randn(tokens, experts)
    with poisoned_memory():
        found = gating_of(logits, top_k, raw, "triton")
    assert found is not None
    weights, index = logits.softmax(-1).topk(top_k)
    assert torch.equal(found.top_k_index, index)
    torch.testing.assert_close(found.top_k_weights, weights if raw else weights / weights.sum(-1, keepdim=True))


def test_gate_of_ties_infinities_and_nan() -> None:
    infinite, nan = float("inf"), float("nan")
    logits = torch.tensor([[1.0, 1, 1, 0, 1], [-infinite, -infinite, 2, -infinite, 3], [0, nan, 1, 2, 3]])
    found = gating_of(logits, 3, True, "triton")
    assert found is not None
    assert found.top_k_index[:2].tolist() == [[0, 1, 2], [4, 2, 0]]
    assert found.top_k_index[2].unique().numel() == 3
    assert found.top_k_index[2].max() < 5
    assert found.top_k_weights[2].isnan().all()
    assert found.top_k_weights[:2].isfinite().all()


def test_what_one_launch_does_not_gate() -> None:
    assert gating_of(torch.zeros(1, MOST_GATED + 1), 1, True, "triton") is None
    assert gating_of(torch.zeros(1, 4, requires_grad=True), 1, True, "triton") is None
    assert gating_of(torch.zeros(1, 4, dtype=torch.float64), 1, True, "triton") is None
    assert gating_of(torch.zeros(1, 4), 1, True) is None


@pytest.mark.parametrize("most", [1000, 0])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (40, 5, 3), (100, 70, 2)])
def test_slots_sorted_by_choice_and_expert(
    tokens: int, experts: int, top_k: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch or several; -1 and numbers past the last expert are none, which come last."""
    monkeypatch.setattr(routing, "MOST_AT_ONCE", most)
    monkeypatch.setattr(routing, "SORT_BLOCK", 32)
    index = torch.randint(-1, experts + 2, (tokens, top_k))
    index[0, 0] = experts - 1
    key = index.masked_fill((index < 0) | (index >= experts), experts)
    with poisoned_memory():
        found = routing.sort_slots(index, experts)
    for choice, keys in enumerate(key.T):
        here = slice(choice * tokens, (choice + 1) * tokens)
        assert torch.equal(found.pair_of_slot[here], keys.argsort(stable=True) * top_k + choice)
        begins = [choice * tokens + int((keys < e).sum()) for e in range(experts + 1)]
        assert found.offsets[choice * (experts + 1) :][: experts + 1].tolist() == begins
    assert found.offsets[-1] == tokens * top_k
    for rows in (1, 16):
        sizes = found.offsets.diff().view(top_k, -1)
        assert ((sizes + rows - 1) // rows).sum(1).max() * top_k <= found.tiles(rows)


def test_sums_of_many_choices_are_of_float32() -> None:
    """Each of their additions would round to 16 bits."""
    out = torch.empty(2, 3, dtype=torch.bfloat16)
    for top_k, dtype in ((2, torch.bfloat16), (3, torch.float32)):
        assert routing.sort_slots(torch.zeros(2, top_k, dtype=torch.int64), 1).sums(out).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_k", [1, 3])
def test_dispatch_and_combine_with_gradients(dtype: torch.dtype, top_k: int) -> None:
    mask = torch.arange(21) % 4 != 1
    check_rows(route(torch.randint(0, 4, (21, top_k)), 4, 12, mask), 131, dtype, "triton")


def test_only_needed_gradients() -> None:
    found = route(torch.randint(0, 3, (6, 1)), 3)
    grad, y, weights = torch.randn(6, 4), torch.randn(6, 4), torch.rand(6, 1)
    call = CombineBackwardCall(grad, y, found.token_of_slot, found.slot_of_token, weights, True, False, "triton")
    dy, dweights = routing.combine_backward(call)
    assert (dy.shape, dweights.numel()) == ((6, 4), 0)
    dy, dweights = routing.combine_backward(replace(call, need_y=False, need_weights=True))
    assert (dy.numel(), dweights.shape) == (0, (6, 1))
