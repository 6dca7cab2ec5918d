"""The experts that the native router takes: ties, NaN, and what `torch.topk` takes."""

import pytest
import torch
from torch.testing import assert_close

from mpoe_kernels.routing.gating import best_experts, native_gating


def decided(logits, top_k, raw=False):
    """Experts and gates of tokens whose logits these are."""
    found = native_gating(torch.eye(len(logits)), logits.T.contiguous(), top_k, raw)
    assert torch.equal(found.logits.nan_to_num(7), logits.nan_to_num(7))
    return found.top_k_index, found.top_k_weights


def test_ties_at_top_k_3_go_to_the_first_experts():
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
    assert_close(gates, want)
    _, raw = decided(logits, 3, raw=True)
    assert_close(raw, torch.softmax(logits, 1).gather(1, index))


@pytest.mark.parametrize("expert", range(4))
def test_the_nan_guard_of_the_router(expert):
    """Wherever the NaN is, the token gets different experts in range, and NaN for its gates; other
    tokens nothing."""
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


@pytest.mark.parametrize(
    "tokens, experts, top_k", [(0, 3, 2), (1, 1, 1), (7, 5, 5), (600, 128, 8), (33, 1024, 16)]
)
def test_the_best_experts_are_those_of_topk(tokens, experts, top_k):
    scores = torch.randn(tokens, experts, requires_grad=True)
    for given in (scores, scores.t().contiguous().t()):
        assert torch.equal(best_experts(given, top_k), scores.topk(top_k).indices)
        assert torch.equal(best_experts(given, top_k, "eager"), scores.topk(top_k).indices)


def test_the_best_experts_of_equal_scores_and_of_nan():
    nan, inf = torch.nan, torch.inf
    scores = torch.tensor(
        [[1.0, 2.0, 2.0, 2.0], [0.0, 3.0, nan, 4.0], [nan] * 4, [-inf, -inf, -1.0, -inf]]
    )
    assert best_experts(scores, 2).tolist() == [[1, 2], [2, 3], [0, 1], [2, 0]]
