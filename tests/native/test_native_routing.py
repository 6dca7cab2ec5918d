"""What only the compiled routing and router guarantee: exact conversions, strided rows, ties, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpoe_kernels import Routing, backend_reasons, combine, dispatch, route
from mpoe_kernels.routing.gating import best_experts, native_gating


@pytest.fixture(autouse=True)
def _native(native_library: None) -> None:
    assert not backend_reasons()["native"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_two_bytes_survives(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(-1, 1)
    routing = route(torch.zeros(values.shape[0], 1, dtype=torch.int64), 1)
    got = combine(values, routing, torch.ones(values.shape[0], 1), backend="native")
    nan = values.isnan()
    assert torch.equal(got[~nan], values[~nan])
    assert bool(got[nan].isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_that_of_torch(dtype: torch.dtype) -> None:
    """A gate times one is rounded as torch rounds that float32: also ties, overflow, subnormals and NaN."""
    rows = 200_000
    bits = torch.randint(-(2**31), 2**31, (rows, 1), dtype=torch.int64)
    near_limits = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 2**-14, 2**-24, 2**-25, 2**-25 * 1.01, 0.0, -0.0])
    ties = (torch.randint(-(2**15), 2**15, (rows, 1), dtype=torch.int32).short().view(dtype)).float() * (1 + 2**-9)
    gates = torch.cat([bits.int().view(torch.float32), ties, near_limits.view(-1, 1), -near_limits.view(-1, 1)])
    routing = route(torch.zeros(gates.shape[0], 1, dtype=torch.int64), 1)
    got = combine(torch.ones(gates.shape[0], 1, dtype=dtype), routing, gates, backend="native")
    want = gates.to(dtype)
    nan = gates.isnan()
    assert torch.equal(got[~nan], want[~nan])
    assert bool(got[nan].isnan().all())


def test_rows_may_lie_apart_or_overlap() -> None:
    routing = route(torch.tensor([[1], [0], [1]]), 2)
    apart = torch.randn(3, 10)[:, 2:6]
    expanded = torch.randn(1, 4).expand(3, 4)
    for x in (apart, expanded, torch.randn(4, 3).T):
        assert torch.equal(dispatch(x, routing, backend="native"), x[routing.token_of_slot])


def test_offsets_may_be_int64() -> None:
    routing = route(torch.tensor([[1], [0], [1]]), 2)
    wide = Routing(routing.expert_offsets.long(), routing.token_of_slot, routing.slot_of_token)
    x = torch.randn(3, 4)
    assert torch.equal(dispatch(x, wide, backend="native"), dispatch(x, routing, backend="native"))


def decided(logits: Tensor, top_k: int, raw: bool = False) -> tuple[Tensor, Tensor]:
    """Experts and gates of tokens whose logits these are."""
    found = native_gating(torch.eye(len(logits)), logits.T.contiguous(), top_k, raw)
    assert torch.equal(found.logits.nan_to_num(7), logits.nan_to_num(7))
    return found.top_k_index, found.top_k_weights


def test_ties_at_top_k_3_go_to_the_first_experts() -> None:
    logits = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 1.0, 2.0, 2.0],
            [3.0, 1.0, 1.0, 1.0, 3.0],
            [0.0, 1.0, 2.0, 1.0, 1.0],
            [-1.0, -1.0, -2.0, -1.0, -1.0],
        ]
    )
    index, gates = decided(logits, 3)
    assert index.tolist() == [[0, 1, 2], [1, 3, 4], [0, 4, 1], [2, 1, 3], [0, 1, 3]]
    want = torch.softmax(logits.gather(1, index), 1)
    torch.testing.assert_close(gates, want)
    _, raw = decided(logits, 3, raw=True)
    torch.testing.assert_close(raw, torch.softmax(logits, 1).gather(1, index))


@pytest.mark.parametrize("expert", range(4))
def test_the_nan_guard_of_the_router(expert: int) -> None:
    """Wherever the NaN is, the token gets different experts in range, and NaN for its gates; other tokens nothing."""
    logits = torch.randn(4, 4)
    spoiled = logits.clone()
    spoiled[1, expert] = torch.nan
    # A product would spread the NaN, so the logits are the tokens themselves.
    found = native_gating(spoiled, torch.eye(4), 3, False)
    clean = native_gating(logits, torch.eye(4), 3, False)
    assert found.top_k_index[1].tolist() == [0, 1, 2]
    assert bool(found.top_k_weights[1].isnan().all())
    for t in (0, 2, 3):
        assert torch.equal(found.top_k_index[t], clean.top_k_index[t])
        assert torch.equal(found.top_k_weights[t], clean.top_k_weights[t])


def test_infinite_logits_give_no_gates() -> None:
    weight = torch.ones(4, 1)
    weight[2] = 1e30
    found = native_gating(torch.tensor([[1e30], [1.0]]), weight, 2, False)
    assert found.top_k_index[0].tolist() == [2, 0]
    assert bool(found.top_k_weights[0].isnan().all())
    assert found.top_k_weights[1].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(0, 3, 2), (1, 1, 1), (7, 5, 5), (600, 128, 8), (33, 1024, 16)]
)
def test_the_best_experts_are_those_of_topk(tokens: int, experts: int, top_k: int) -> None:
    scores = torch.randn(tokens, experts, requires_grad=True)
    for given in (scores, scores.t().contiguous().t()):
        assert torch.equal(best_experts(given, top_k), scores.topk(top_k).indices)
        assert torch.equal(best_experts(given, top_k, "eager"), scores.topk(top_k).indices)


def test_the_best_experts_of_equal_scores_and_of_nan() -> None:
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 3.0, nan, 4.0], [nan] * 4, [-inf, -inf, -1.0, -inf]])
    assert best_experts(scores, 2).tolist() == [[1, 2], [2, 3], [0, 1], [2, 0]]
