"""Properties of the whole layer for random sizes, experts, routers, masks and dtypes, against a float64 loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import ACTIVATIONS, MPOEFeedForward, routing_context

# Covers eager PyTorch's own error in these dtypes, for sums of at most 2 x 60 products and two gates.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float64: 1e-12}


@st.composite
def layers(draw) -> tuple[MPOEFeedForward, torch.Tensor, torch.Tensor | None]:
    """A layer in eval mode, tokens ``[T, I]``, and a mask ``[T]`` or None."""
    sizes = draw(st.integers(2, 30)), draw(st.integers(2, 60))
    experts = draw(st.integers(1, 6))
    router = RouterConfig(
        top_k=draw(st.integers(1, min(experts, 3))),
        is_scale_prob=draw(st.booleans()),
        eval_capacity_factor=draw(st.sampled_from((None, None, 0.5, 1.0))),
    )
    config = MPOEConfig(
        num_experts=experts,
        router=router,
        shape=draw(st.sampled_from(("separable", "paper", "light"))),
        max_bond=draw(st.sampled_from((None, 1, 3, 8))),
        light_p=draw(st.sampled_from((4, 16))),
        expert_type=draw(st.sampled_from(("mpo", "mpo", "dense"))),
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    activation = draw(st.sampled_from(("relu", "gelu_new", "silu")))
    dtype = draw(st.sampled_from(tuple(TOLERANCE)))
    layer = MPOEFeedForward(
        *sizes, config, activation=activation, gated=draw(st.booleans()), bias=draw(st.booleans()), dtype=dtype
    ).eval()
    tokens = draw(st.integers(0, 12))
    x = torch.randn(tokens, sizes[0], dtype=dtype)
    if draw(st.booleans()):
        x = x.T.contiguous().T  # strides of a transposed matrix
    if draw(st.booleans()):
        x = x[:1].expand(tokens, -1)  # all tokens go to the same experts, the others get none
    mask = torch.rand(tokens) > 0.3 if draw(st.booleans()) else None
    return layer, x, mask


def by_hand(layer: MPOEFeedForward, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The result token by token and expert by expert in float64, with the router's own decision."""
    experts = layer.experts
    decision = layer.router(x)
    routing = layer.router.route(decision, mask)
    weights = {kind: p.dense_weights().double() for kind, p in experts.projections().items()}
    bias = {kind: 0 if p.bias is None else p.bias.double() for kind, p in experts.projections().items()}
    act, y = ACTIVATIONS[experts.activation], torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for k, e in enumerate(decision.top_k_index[t]):
            if routing.slot_of_token[t, k] < 0:
                continue  # dropped, or padding
            up = row @ weights["up"][e] + bias["up"]
            hidden = act(row @ weights["gate_proj"][e]) * up if experts.is_gated else act(up)
            y[t] += decision.top_k_weights[t, k].double() * (hidden @ weights["down"][e] + bias["down"])
    return y


@settings(max_examples=60)
@given(layers())
def test_the_layer_is_the_loop(drawn) -> None:
    layer, x, mask = drawn
    with torch.no_grad(), routing_context() as routing:
        y = layer(x, mask)
        expected = by_hand(layer, x, mask)
    assert y.dtype == x.dtype
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
    torch.testing.assert_close(y.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[x.dtype])
    valid = x.shape[0] if mask is None else int(mask.sum())
    load = routing.records[0].expert_load
    assert int(load.sum()) <= valid * layer.router.config.top_k
    if layer.router.config.eval_capacity_factor is None:
        assert int(load.sum()) == valid * layer.router.config.top_k


@settings(max_examples=30)
@given(layers())
def test_gradients_are_finite_and_reach_what_took_part(drawn) -> None:
    layer, x, mask = drawn
    x = x.clone().requires_grad_()
    layer.train()
    layer(x, mask).float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert bool(torch.isfinite(x.grad).all())
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name
    if mask is not None:
        assert bool((x.grad[~mask] == 0).all())
