"""`moe_type`: GShard's top-2 gating with its policies and capacities, and a feed-forward network without a router."""

from __future__ import annotations

import math

import pytest
import torch

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, TopKRouter, routing_context

TOKENS, EXPERTS = 40, 4


def gshard(**values):
    return TopKRouter(6, EXPERTS, RouterConfig.gshard(capacity_factor=None, eval_capacity_factor=None, **values))


def shares(router, x):
    """Probability of the second expert as a share of both."""
    first, second = torch.softmax(x @ router.weight.T, -1).topk(2).values.unbind(-1)
    return second / (first + second)


@pytest.mark.parametrize("policy", ["all", "none", "threshold"])
def test_second_choices_by_policy(policy):
    router, x = gshard(second_policy=policy, second_threshold=0.48, init_scale=4.0), torch.randn(TOKENS, 6)
    expected = {"all": torch.ones(TOKENS), "none": torch.zeros(TOKENS), "threshold": shares(router, x) > 0.48}[policy]
    decision = router(x)
    assert torch.equal(decision.kept[:, 1], expected.bool())
    assert decision.kept[:, 0].all()
    if policy == "threshold":
        assert 0 < int(expected.sum()) < TOKENS


def test_a_second_choice_at_the_threshold_is_dropped():
    router = gshard(second_policy="threshold", second_threshold=0.5, init_scale=0.0)  # both gates are equal
    assert not router(torch.randn(3, 6)).kept[:, 1].any()


def test_random_policy_keeps_seconds_in_proportion_to_their_share():
    router, x = gshard(second_policy="random", second_threshold=0.8), torch.randn(1, 6).expand(20_000, 6)
    expected = float(shares(router, x[:1]).detach()) / 0.8
    assert float(router(x).kept[:, 1].float().mean()) == pytest.approx(expected, abs=0.02)
    router.eval()
    assert router(x).kept.all()  # evaluation is repeatable: all are kept


def test_gates_sum_to_one_over_the_kept_and_lone_ones_keep_their_gradient():
    router, x = gshard(second_policy="threshold", second_threshold=0.48, init_scale=4.0), torch.randn(TOKENS, 6)
    decision = router(x)
    torch.testing.assert_close(decision.top_k_weights.sum(-1), torch.ones(TOKENS))
    assert torch.equal(decision.top_k_weights == 0, ~decision.kept)
    lone = ~decision.kept[:, 1]
    (got,) = torch.autograd.grad(decision.top_k_weights[lone].sum(), router.weight, retain_graph=True)
    log_p = torch.log_softmax(x[lone] @ router.weight.T, -1).max(-1).values
    (expected,) = torch.autograd.grad(log_p.sum(), router.weight)
    torch.testing.assert_close(got, expected)
    raw = gshard(second_policy="all", is_scale_prob=True)
    probabilities = torch.softmax(x @ raw.weight.T, -1)
    torch.testing.assert_close(raw(x).top_k_weights, probabilities.topk(2).values)


def test_dropped_choices_take_no_slot_and_no_capacity():
    router, x = gshard(second_policy="threshold", second_threshold=0.48, init_scale=4.0), torch.randn(TOKENS, 6)
    mask = torch.arange(TOKENS) % 5 > 0
    decision = router(x)
    routing = router.route(decision, mask)
    kept = decision.kept & mask[:, None]
    counts = torch.bincount(decision.top_k_index[kept], minlength=EXPERTS)
    assert torch.equal(routing.expert_load.long(), counts)
    assert torch.equal(routing.slot_of_token >= 0, kept)
    tokens = torch.arange(TOKENS)[:, None].expand(-1, 2)
    assert torch.equal(routing.token_of_slot[routing.slot_of_token[kept]], tokens[kept])


@pytest.mark.parametrize(("training", "factor"), [(True, 1.25), (False, 2.0)])
def test_capacities_of_the_original(training, factor):
    router = TopKRouter(6, EXPERTS, RouterConfig.gshard()).train(training)
    assert router.capacity(TOKENS) == math.ceil(factor * TOKENS / EXPERTS)
    assert router.capacity(4) == 4  # the minimum
    torch.nn.init.zeros_(router.weight)  # every token chooses the same two experts
    routing = router.route(router(torch.randn(TOKENS, 6)))
    assert int(routing.expert_load.max()) == router.capacity(TOKENS)


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
def test_equal_experts_compute_one_network_whatever_is_kept(expert_type, policy):
    router = {"second_policy": policy, "capacity_factor": None}
    config = MPOEConfig(moe_type="moe", num_experts=EXPERTS, expert_type=expert_type, router=router)
    ffn = MPOEFeedForward(24, 48, config, activation="gelu").train()
    alone = MPOEFeedForward(24, 48, MPOEConfig(moe_type="none", expert_type="dense"), activation="gelu")
    with torch.no_grad():
        for kind, projection in ffn.experts.projections().items():
            weight = alone.experts.projections()[kind].weight[0]
            projection.load_weight_(weight)
    x = torch.randn(3, 7, 24, requires_grad=True)
    y, expected = ffn(x), alone(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    (got,) = torch.autograd.grad((ffn(x) * weights).sum(), x)
    assert torch.isfinite(got).all()


def test_balancing_loss_counts_first_choices():
    config = MPOEConfig(moe_type="moe", num_experts=EXPERTS)
    ffn = MPOEFeedForward(24, 48, config)
    with routing_context() as routing:
        ffn(torch.randn(9, 24))
    (record,) = routing.records
    assert torch.equal(record.top_k_index, record.logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
def test_without_a_router(expert_type):
    config = MPOEConfig(moe_type="none", num_experts=8, expert_type=expert_type)
    assert config.num_experts == 1
    ffn = MPOEFeedForward(24, 48, config, activation="relu", bias=True).eval()
    assert ffn.router is None
    assert not any("router" in name for name, _ in ffn.named_parameters())
    weights = {kind: p.dense_weights()[0] for kind, p in ffn.experts.projections().items()}
    x, mask = torch.randn(11, 24), torch.rand(11) > 0.3
    with routing_context() as routing:
        y = ffn(x, mask)
    expected = torch.relu(x @ weights["up"] + ffn.experts.up.bias) @ weights["down"] + ffn.experts.down.bias
    torch.testing.assert_close(y, expected * mask[:, None], rtol=1e-4, atol=1e-5)
    assert routing.records == []
