"""`TopKRouter` and its losses against formulas written by hand."""

from __future__ import annotations

import pytest
import torch

from mpoe.config import RouterConfig
from mpoe.layers import TopKRouter, load_balancing_loss, router_z_loss
from mpoe.layers.losses import count_choices


def test_top1_gate_is_one_with_the_gradient_of_log_p():
    router = TopKRouter(6, 4)
    x = torch.randn(9, 6)
    out = router(x)
    assert torch.equal(out.top_k_weights, torch.ones(9, 1))
    out.top_k_weights.sum().backward()
    got = router.weight.grad.clone()
    router.weight.grad = None
    torch.log_softmax(router(x).logits, -1).max(-1).values.sum().backward()
    torch.testing.assert_close(got, router.weight.grad)


def test_top_k_weights_sum_to_one_and_raw_probabilities():
    x = torch.randn(9, 6)
    out = TopKRouter(6, 4, RouterConfig(top_k=3))(x)
    torch.testing.assert_close(out.top_k_weights.sum(-1), torch.ones(9))
    assert (out.top_k_weights[:, :-1] >= out.top_k_weights[:, 1:]).all()
    raw = TopKRouter(6, 4, RouterConfig(top_k=2, is_scale_prob=True))
    out = raw(x)
    probabilities = torch.softmax(x @ raw.weight.T, -1)
    torch.testing.assert_close(out.top_k_weights, probabilities.gather(-1, out.top_k_index))
    assert torch.equal(out.top_k_index, probabilities.topk(2).indices)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("factor", [None, 0.5, 2.5])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_scores_scales_and_corrections_by_hand(scoring, factor, corrected, recorded):
    config = RouterConfig(top_k=2, scoring_func=scoring, routed_scaling_factor=factor, bias_update_rate=0.1 * corrected)
    router, x = TopKRouter(in_features=6, num_experts=4, config=config), torch.randn(9, 6)
    correction = torch.tensor([0.0, 0.9, 0.0, -0.9]) if corrected else torch.zeros(4)
    if corrected:
        router.e_score_correction_bias.copy_(correction)
    with torch.set_grad_enabled(recorded):
        found = router(x)
    scores = found.logits.sigmoid() if scoring == "sigmoid" else found.logits.softmax(-1)
    assert torch.equal(found.top_k_index, (scores + correction).topk(2).indices)
    chosen = scores.gather(-1, found.top_k_index)
    torch.testing.assert_close(found.top_k_weights, chosen / chosen.sum(-1, keepdim=True) * (factor or 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_router_computes_in_float32_under_autocast(dtype):
    router = TopKRouter(64, 4)
    x = torch.randn(20, 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out = router(x)
    assert out.logits.dtype == out.top_k_weights.dtype == torch.float32
    torch.testing.assert_close(out.logits, x.float() @ router.weight.T)


def test_half_precision_parameters_still_route_in_float32():
    router = TopKRouter(64, 4).bfloat16()
    assert router(torch.randn(3, 64).bfloat16()).logits.dtype == torch.float32


def test_jitter_only_in_training():
    router = TopKRouter(6, 4, RouterConfig(jitter=0.2))
    x = torch.randn(9, 6)
    assert not torch.equal(router(x).logits, router(x).logits)
    router.eval()
    assert torch.equal(router(x).logits, x @ router.weight.T)


def test_jitter_is_as_wide_as_it_says_on_both_sides():
    router = TopKRouter(8, 8, RouterConfig(jitter=0.25))
    with torch.no_grad():
        router.weight.copy_(torch.eye(8))  # the logits are the input including its noise
    noise = router(torch.ones(4000, 8)).logits.detach()
    assert 0.75 <= float(noise.min()) < 0.76
    assert 1.24 < float(noise.max()) <= 1.25
    assert float(noise.mean()) == pytest.approx(1.0, abs=5e-3)  # of 32,000: 6 standard errors


def test_a_capacity_beyond_all_slots_is_none():
    x = torch.randn(9, 6)
    for options in ({"capacity_factor": 1e300}, {"capacity_factor": 1.0, "min_capacity": 10**30}):
        router = TopKRouter(6, 4, RouterConfig(**options))
        assert router.capacity(10**12) == 2**31 - 1
        assert torch.equal(router.route(router(x)).slot_of_token.sort(0).values.squeeze(-1), torch.arange(9))


@pytest.mark.parametrize("config", [RouterConfig(top_k=2), RouterConfig.gshard()])
def test_routers_without_memory(config):
    out = TopKRouter(6, 4, config, device="meta")(torch.empty(9, 6, device="meta"))
    assert out.top_k_index.shape == out.top_k_weights.shape == (9, 2)
    assert out.logits.is_meta


def test_capacity_factors():
    router = TopKRouter(6, 4, RouterConfig(top_k=2, capacity_factor=1.25, eval_capacity_factor=2.0))
    assert router.capacity(10) == 7  # ceil(1.25 * 10 * 2 / 4)
    router.eval()
    assert router.capacity(10) == 10
    assert TopKRouter(6, 4).capacity(10) is None


def test_init_is_truncated_normal_of_the_switch_scale():
    weight = TopKRouter(1000, 8, RouterConfig(init_scale=0.1)).weight
    std = (0.1 / 1000) ** 0.5
    assert weight.abs().max() <= 2 * std
    assert float(weight.detach().std()) == pytest.approx(
        std * 0.88, rel=0.05
    )  # std of a normal truncated at two sigmas


def test_balancing_loss_by_hand():
    logits, index = torch.randn(7, 3), torch.tensor([[0], [1], [0], [2], [0], [1], [0]])
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 0]).bool()
    probabilities = torch.softmax(logits, -1)
    expected = 0.0
    for e in range(3):
        f = sum(float(index[t, 0] == e) for t in range(7) if mask[t]) / 5
        p = sum(float(probabilities[t, e]) for t in range(7) if mask[t]) / 5
        expected += 3 * f * p
    assert float(load_balancing_loss(logits, index, mask)) == pytest.approx(expected, rel=1e-5)


def test_balancing_loss_is_one_when_balanced_and_e_when_collapsed():
    even = load_balancing_loss(torch.zeros(8, 4), torch.arange(8)[:, None] % 4)
    assert float(even) == pytest.approx(1.0)
    collapsed = load_balancing_loss(torch.tensor([[50.0, 0, 0, 0]] * 8), torch.zeros(8, 1, dtype=torch.long))
    assert float(collapsed) == pytest.approx(4.0)


def test_top2_fractions_sum_to_one():
    loss = load_balancing_loss(torch.zeros(6, 3), torch.tensor([[0, 1]] * 6))
    assert float(loss) == pytest.approx(1.0)


def test_layers_are_independent():
    logits, index = torch.randn(2, 5, 3), torch.randint(0, 3, (2, 5, 1))
    both = load_balancing_loss(logits, index)
    each = [load_balancing_loss(one, idx) for one, idx in zip(logits, index, strict=True)]
    torch.testing.assert_close(both, torch.stack(each))


def test_z_loss_by_hand_ignores_padding_even_if_infinite():
    logits = torch.randn(4, 3)
    expected = torch.logsumexp(logits[:3], -1).square().mean()
    logits[3] = float("inf")
    mask = torch.tensor([True, True, True, False])
    torch.testing.assert_close(router_z_loss(logits, mask), expected)
    assert torch.isfinite(load_balancing_loss(logits, torch.zeros(4, 1, dtype=torch.long), mask))


def test_no_valid_token_gives_zero():
    mask = torch.zeros(4, dtype=torch.bool)
    assert float(router_z_loss(torch.randn(4, 3), mask)) == 0
    assert float(load_balancing_loss(torch.randn(4, 3), torch.zeros(4, 1, dtype=torch.long), mask)) == 0


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"x must be \[T, I\] with I = 6; got \[2, 5\]"):
        TopKRouter(6, 4)(torch.randn(2, 5))
    with pytest.raises(ValueError, match="top_k must be at most"):
        TopKRouter(6, 2, RouterConfig(top_k=3))
    with pytest.raises(ValueError, match="token_mask"):
        router_z_loss(torch.randn(4, 3), torch.ones(3).bool())
    with pytest.raises(ValueError, match="top_k_index"):
        load_balancing_loss(torch.randn(4, 3), torch.zeros(5, 1, dtype=torch.long))


def test_losses_of_parts_with_the_choices_of_all_average_to_the_whole():
    """What the ranks of a `global_batch` compute: parts of unequal sizes, with padding."""
    logits, index = torch.randn(2, 9, 4), torch.randint(0, 4, (2, 9, 2))
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    whole = count_choices(index, 4, mask)
    assert whole.sum(-1).tolist() == [12, 12]
    total = torch.zeros(2)
    for part in (slice(0, 3), slice(3, 9)):
        share = mask[part].sum() / mask.sum()
        total += share * load_balancing_loss(logits[:, part], index[:, part], mask[part], whole)
    torch.testing.assert_close(total, load_balancing_loss(logits, index, mask))
    local = [load_balancing_loss(logits[:, part], index[:, part], mask[part]) for part in (slice(0, 3), slice(3, 9))]
    assert not torch.allclose((local[0] * 2 + local[1] * 4) / 6, total, rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("loss", ["balance", "z"])
def test_what_padding_holds_changes_no_loss_and_no_gradient(bad, loss):
    def value(logits):
        return load_balancing_loss(logits, index, mask) if loss == "balance" else router_z_loss(logits, mask)

    logits, mask = torch.randn(5, 3), torch.tensor([1, 0, 1, 1, 0]).bool()
    index = logits.argmax(-1, keepdim=True)
    spoiled = torch.where(mask[:, None], logits, bad)
    gradients = []
    for each in (logits.clone().requires_grad_(), spoiled.requires_grad_()):
        total = value(each)
        (gradient,) = torch.autograd.grad(total, each)
        gradients.append((total.detach(), gradient))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert gradients[1][1][mask].abs().sum() > 0
    assert gradients[1][1][~mask].abs().sum() == 0
