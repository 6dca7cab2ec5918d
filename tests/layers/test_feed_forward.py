"""`MPOEFeedForward`, its experts and the call context; properties for random sizes, against a
float64 loop."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

from mpoe import convert_to_mpoe
from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import (
    ACTIVATIONS,
    MPOEFeedForward,
    MPOLinear,
    current_routing,
    grouped_dense_linear,
    load_balancing_loss,
    routing_context,
)
from mpoe.layers.cores import _grouped_mm_runs
from mpoe.layers.feed_forward import _say_that_nothing_balances
from tests.assertions import refuses
from tests.cases import either

# Covers eager PyTorch's own error in these dtypes, for sums of at most 2 x 60 products and two
# gates.
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
    activation = draw(st.sampled_from(sorted(ACTIVATIONS)))
    dtype = draw(st.sampled_from(tuple(TOLERANCE)))
    layer = MPOEFeedForward(
        *sizes,
        config,
        activation=activation,
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        dtype=dtype,
    ).eval()
    tokens = draw(st.integers(0, 12))
    x = torch.randn(tokens, sizes[0], dtype=dtype)
    if draw(st.booleans()):
        x = x.T.contiguous().T  # strides of a transposed matrix
    if draw(st.booleans()):
        x = x[:1].expand(tokens, -1)  # all tokens go to the same experts, the others get none
    mask = torch.rand(tokens) > 0.3 if draw(st.booleans()) else None
    if mask is not None and draw(st.booleans()):
        x = torch.where(mask[:, None], x, torch.nan)  # whatever padding holds
    return layer, x, mask


def by_hand(layer, x, mask):
    """The result token by token and expert by expert in float64, with the router's own decision."""
    experts = layer.experts
    decision = layer.router(x)
    routing = layer.router.route(decision, mask)
    weights = {kind: p.dense_weights().double() for kind, p in experts.projections().items()}
    bias = {
        kind: 0 if p.bias is None else p.bias.double() for kind, p in experts.projections().items()
    }
    act, y = ACTIVATIONS[experts.activation], torch.zeros(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for k, e in enumerate(decision.top_k_index[t]):
            if routing.slot_of_token[t, k] < 0:
                continue  # dropped, or padding
            up = row @ weights["up"][e] + bias["up"]
            hidden = act(row @ weights["gate_proj"][e]) * up if experts.is_gated else act(up)
            y[t] += decision.top_k_weights[t, k].double() * (
                hidden @ weights["down"][e] + bias["down"]
            )
    return y


@settings(max_examples=60)
@given(layers())
def test_the_layer_is_the_loop(drawn):
    layer, x, mask = drawn
    with torch.no_grad(), routing_context() as routing:
        y = layer(x, mask)
        expected = by_hand(layer, x, mask)
    assert y.dtype == x.dtype
    scale = max(float(expected.abs().max()) if expected.numel() else 0.0, 1e-3)
    assert_close(y.double() / scale, expected / scale, rtol=0, atol=TOLERANCE[x.dtype])
    valid = x.shape[0] if mask is None else int(mask.sum())
    load = routing.records[0].expert_load
    assert int(load.sum()) <= valid * layer.router.config.top_k
    if layer.router.config.eval_capacity_factor is None:
        assert int(load.sum()) == valid * layer.router.config.top_k


@settings(max_examples=30)
@given(layers())
def test_gradients_are_those_of_the_loop(drawn):
    layer, x, mask = drawn
    layer.double().train()
    x = (
        x.double().nan_to_num(0).requires_grad_()
    )  # NaN times a gate's gradient of zero is no number
    inputs, grad = [x, *layer.parameters()], torch.randn(x.shape, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad(y, inputs, grad, allow_unused=True, materialize_grads=True)
        for y in (layer(x, mask), by_hand(layer, x, mask) + 0 * layer.router.weight.sum())
    )
    for name, got, want in zip(
        ["x", *dict(layer.named_parameters())], found, expected, strict=True
    ):
        scale = max(float(want.abs().max()) if want.numel() else 0.0, 1.0)
        assert_close(
            got / scale, want / scale, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    if mask is not None:
        assert bool((found[0][~mask] == 0).all())


@either("own_bias")
@pytest.mark.parametrize(
    "rows, columns, dtype",
    [(10, 8, torch.float32), (8, 10, torch.float32), (8, 12, torch.float32), (8, 8, torch.float64)],
)
def test_grouped_dense_linear(own_bias, rows, columns, dtype):
    x, weight = torch.randn(10, rows, dtype=dtype), torch.randn(4, rows, columns, dtype=dtype)
    x[8:] = torch.nan  # past the last offset
    assert _grouped_mm_runs(x, weight) == (columns == 12)
    assert not _grouped_mm_runs(x[:2], weight)
    assert not len(grouped_dense_linear(x[:0], weight[:1], torch.zeros(2, dtype=torch.int32)))
    bias = torch.randn(*([4] if own_bias else []), columns, dtype=dtype)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    y = grouped_dense_linear(x, weight, torch.tensor([0, 3, 3, 8, 8], dtype=torch.int32), bias)
    of_expert = bias if own_bias else bias.expand(4, -1)
    expected = torch.cat([x[:3] @ weight[0] + of_expert[0], x[3:8] @ weight[2] + of_expert[2]])
    assert_close(y[:8], expected)
    assert torch.equal(y[8:], torch.zeros(2, columns, dtype=dtype))
    grad = torch.randn_like(expected)
    found = torch.autograd.grad(y, inputs, torch.cat([grad, torch.ones_like(y[8:])]))
    for got, want in zip(found, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert_close(got, want)


def feed_forward(gated=False, activation="gelu_new", bias=True, **config):
    config = MPOEConfig(num_experts=4, **{"shape": "separable", **config})
    return MPOEFeedForward(24, 48, config, activation=activation, gated=gated, bias=bias).eval()


def test_expert_dropout_replaces_the_familys_rate_in_training_only():
    config = MPOEConfig(num_experts=2, router=RouterConfig(expert_dropout=0.5), shape="separable")
    ffn = MPOEFeedForward(24, 48, config, dropout=0.0)
    x = torch.randn(8, 24)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
    assert MPOEFeedForward(24, 48, MPOEConfig(shape="separable"), dropout=0.1).expert_dropout == 0.1


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
def test_compiles_fullgraph_inside_and_outside_a_context(expert_type):
    if expert_type == "dense" and torch.__version__ < "2.15":
        pytest.skip("the baseline's F.grouped_mm compiles in bfloat16 only before torch 2.15")
    ffn = feed_forward(
        gated=True, bias=False, expert_type=expert_type, router=RouterConfig(top_k=2)
    )
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()

    def call(x, mask):
        with routing_context({"main": mask}) as routing:
            y = ffn(x)
        return y, routing.records[0].expert_load

    whole = torch.compile(call, backend="aot_eager", fullgraph=True)
    y, load = call(x, mask)
    compiled_y, compiled_load = whole(x, mask)
    assert_close(compiled_y, y)
    assert torch.equal(compiled_load, load)
    compiled_y.sum().backward()
    assert ffn.router.weight.grad is not None
    if torch.__version__ >= "2.13":  # torch 2.11 compiles whole models, not a layer inside a call
        layer = torch.compile(ffn, backend="aot_eager", fullgraph=True)
        with routing_context({"main": mask}) as routing:
            assert_close(layer(x), y)
        assert len(routing.records) == 1
    assert current_routing() is None


def test_autocast_with_float32_parameters():
    for expert_type in ("mpo", "dense"):
        ffn = feed_forward(expert_type=expert_type)
        x = torch.randn(6, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = ffn(x)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), ffn(x), rtol=0.05, atol=0.02)
        y.float().sum().backward()
        assert ffn.experts.up.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_are_brought_to_the_experts_dtype(dtype):
    layer = MPOEFeedForward(8, 16, MPOEConfig(num_experts=2, shape="separable")).eval()
    x = torch.randn(3, 8).to(dtype)
    found = layer(x)
    assert found.dtype == torch.float32  # as documented
    assert torch.equal(found, layer(x.float()))
    refuses(TypeError, "dtype", MPOLinear(8, 4), x)
    hidden = MPOEFeedForward(8, 16, MPOEConfig(num_experts=2)).to(dtype).eval()
    hidden.down.float()  # as Transformers keeps T5's
    assert hidden(x).dtype == torch.float32


@pytest.mark.parametrize("kind", ["mpo", "dense"])
def test_random_weights_have_the_scale_of_their_projection(kind):
    config = MPOEConfig(num_experts=2, shape="paper", expert_type=kind)
    experts = MPOEFeedForward(8, 16, config, init_std={"up": 0.5}).experts
    assert [each.init_std for each in experts.children()] == [0.5, 0.02]


@either("gated")
def test_one_config_means_the_same_in_a_layer_and_in_a_model(gated):
    config = MPOEConfig(num_experts=3)
    layer = MPOEFeedForward(
        8, 32, config, activation="silu", gated=gated, bias=not gated, init_std={"up": 0.5}
    )
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    model = convert_to_mpoe(
        LlamaModel(LlamaConfig(vocab_size=9, num_key_value_heads=2, **sizes)), config
    )
    converted = model.layers[0].mlp
    assert isinstance(layer, MPOEFeedForward)
    assert layer.router.top_k == converted.router.top_k == 2
    experts = dict(layer.experts.auxiliary)
    assert {"right", "left", *(["right_gate"] if gated else [])} == set(experts)
    assert {block.shape for block in experts.values()} == {
        converted.experts.auxiliary["right"].shape
    }
    x = torch.randn(2, 3, 8)
    u = (
        nn.functional.silu(layer.gate_proj(x)) * layer.up(x)
        if gated
        else nn.functional.silu(layer.up(x))
    )
    assert_close(layer(x), layer.down(u))  # experts begin as identities
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))


def test_one_expert_without_a_router_is_a_dense_network():
    layer, x = (
        MPOEFeedForward(8, 16, MPOEConfig(num_experts=1, moe_type="none", shape="hidden")),
        torch.randn(2, 3, 8),
    )
    assert_close(layer(x), layer.down(layer.up(x).relu()))


def test_a_layer_that_trains_alone_says_that_nothing_balances_it():
    layer, x = MPOEFeedForward(8, 16, MPOEConfig(num_experts=3)), torch.randn(2, 8)
    _say_that_nothing_balances.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with routing_context() as routing:
            layer(x)
        with torch.no_grad():
            layer(x)
        layer.eval()(x)
    assert load_balancing_loss(routing.records[0].logits, routing.records[0].top_k_index) > 0
    with pytest.warns(
        UserWarning,
        match=r"nothing adds its balancing loss: run it in mpoe\.layers\.routing_context",
    ):
        layer.train()(x)
