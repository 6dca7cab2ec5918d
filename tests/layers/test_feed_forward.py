"""`MPOEFeedForward`, its experts and the call context."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from mpoe import convert_to_mpoe
from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import (
    ACTIVATIONS,
    DenseExperts,
    MPOEFeedForward,
    MPOExperts,
    MPOLinear,
    current_routing,
    grouped_dense_linear,
    load_balancing_loss,
    routing_context,
)
from mpoe.layers.feed_forward import _say_that_nothing_balances
from mpoe_kernels import MPOShape

from .test_layer_properties import by_hand


def feed_forward(gated=False, activation="gelu_new", bias=True, **config):
    return MPOEFeedForward(
        24,
        48,
        MPOEConfig(num_experts=4, **{"shape": "separable", **config}),
        activation=activation,
        gated=gated,
        bias=bias,
    ).eval()


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_agree_between_mpo_and_dense(activation):
    x = torch.randn(6, 24)
    ffn = feed_forward(activation=activation, bias=False)
    torch.testing.assert_close(ffn(x).double(), by_hand(ffn, x, None), rtol=1e-4, atol=1e-5)


def test_gradients_of_dense_experts_match_a_loop():
    ffn = feed_forward(expert_type="dense", router=RouterConfig(top_k=2))
    x = torch.randn(9, 24)
    mask = torch.rand(9) > 0.3
    ffn(x, mask).square().sum().backward()
    got = {n: p.grad.clone() for n, p in ffn.named_parameters() if p.grad is not None}
    ffn.zero_grad()
    by_hand(ffn, x, mask).square().sum().backward()
    for name, parameter in ffn.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("rows", "columns", "dtype"), [(7, 10, torch.float32), (8, 8, torch.float64), (8, 8, None)])
def test_grouped_dense_linear(rows, columns, dtype):
    dtype = dtype or torch.float32
    x = torch.randn(10, rows, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, rows, columns, dtype=dtype)
    offsets = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    y = grouped_dense_linear(x, weight, offsets, torch.ones(columns, dtype=dtype))
    expected = torch.cat([x[:3] @ weight[0], x[3:8] @ weight[2]]) + 1
    torch.testing.assert_close(y[:8], expected)
    assert torch.equal(y[8:], torch.zeros_like(y[8:]))
    y.sum().backward()
    assert torch.equal(x.grad[8:], torch.zeros_like(x.grad[8:]))


def test_padding_is_neither_routed_nor_counted():
    ffn = feed_forward()
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    with routing_context({"main": mask}) as routing:
        y = ffn(x)
    x2 = torch.where(mask[..., None], x, torch.full_like(x, 1e4))
    with routing_context({"main": mask}) as again:
        y2 = ffn(x2)
    assert torch.equal(y[mask], y2[mask])
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    assert int(routing.records[0].expert_load.sum()) == 5
    assert torch.equal(routing.records[0].expert_load, again.records[0].expert_load)


def test_capacity_drops_the_last_tokens_of_a_full_expert():
    ffn = feed_forward(router=RouterConfig(eval_capacity_factor=1.0))
    torch.nn.init.zeros_(ffn.router.weight)  # every token ties; topk sends them all to one expert
    x = torch.randn(8, 24)
    with routing_context() as routing:
        y = ffn(x)
    assert sorted(routing.records[0].expert_load.tolist()) == [0, 0, 0, 2]
    assert (y[:2] != 0).any()
    assert torch.equal(y[2:], torch.zeros_like(y[2:]))


def test_expert_dropout_replaces_the_familys_rate_in_training_only():
    config = MPOEConfig(num_experts=2, router=RouterConfig(expert_dropout=0.5), shape="separable")
    ffn = MPOEFeedForward(24, 48, config, dropout=0.0)
    x = torch.randn(8, 24)
    assert not torch.equal(ffn(x), ffn(x))
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
    assert MPOEFeedForward(24, 48, MPOEConfig(shape="separable"), dropout=0.1).expert_dropout == 0.1


def test_central_mask_stops_its_gradient_only():
    ffn = feed_forward()
    ffn.experts.up.central_masked = True
    ffn(torch.randn(6, 24)).sum().backward()
    assert ffn.experts.up.central.grad is None
    assert all(core.grad is not None for core in ffn.experts.up.auxiliary)
    assert ffn.experts.down.central.grad is not None


def test_contexts_do_not_leak_between_threads():
    ffn = feed_forward()
    x = torch.randn(1, 4, 24)
    loads, barrier = {}, threading.Barrier(3)

    def work(valid):
        mask = (torch.arange(4) < valid)[None]
        with routing_context({"main": mask}) as routing:
            barrier.wait()
            with torch.no_grad():
                ffn(x)
            barrier.wait()
        loads[valid] = [int(record.expert_load.sum()) for record in routing.records]

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loads == {1: [1], 2: [2], 4: [4]}
    assert current_routing() is None


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
def test_compiles_fullgraph_inside_and_outside_a_context(expert_type):
    if expert_type == "dense" and torch.__version__ < "2.15":
        pytest.skip("the baseline's F.grouped_mm compiles in bfloat16 only before torch 2.15")
    ffn = feed_forward(gated=True, bias=False, expert_type=expert_type, router=RouterConfig(top_k=2))
    x = torch.randn(2, 5, 24)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()

    def call(x, mask):
        with routing_context({"main": mask}) as routing:
            y = ffn(x)
        return y, routing.records[0].expert_load

    whole = torch.compile(call, backend="aot_eager", fullgraph=True)
    y, load = call(x, mask)
    compiled_y, compiled_load = whole(x, mask)
    torch.testing.assert_close(compiled_y, y)
    assert torch.equal(compiled_load, load)
    compiled_y.sum().backward()
    assert ffn.router.weight.grad is not None
    if torch.__version__ >= "2.13":  # torch 2.11 compiles whole models, not a layer inside a call
        layer = torch.compile(ffn, backend="aot_eager", fullgraph=True)
        with routing_context({"main": mask}) as routing:
            torch.testing.assert_close(layer(x), y)
        assert len(routing.records) == 1
    assert current_routing() is None


def test_autocast_with_float32_parameters():
    for expert_type in ("mpo", "dense"):
        ffn = feed_forward(expert_type=expert_type)
        x = torch.randn(6, 24, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = ffn(x)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), ffn(x), rtol=0.05, atol=0.02)
        y.float().sum().backward()
        assert ffn.experts.up.bias.grad.dtype == torch.float32


def test_bad_input():
    ffn = feed_forward()
    with pytest.raises(ValueError, match=r"hidden_states must be \[..., 24\]; got \[2, 23\]"):
        ffn(torch.randn(2, 23))
    with pytest.raises(ValueError, match=r"token_mask must be \[2, 3\]"):
        ffn(torch.randn(2, 3, 24), torch.ones(2, 4).bool())
    with pytest.raises(ValueError, match="did you mean 'gelu'"):
        DenseExperts(4, 8, 2, "gellu")
    with pytest.raises(ValueError, match="the down shape must be"):
        MPOExperts({"up": MPOShape.paper(4, 8), "down": MPOShape.paper(4, 8)}, 2)


@pytest.mark.parametrize("expert_type", ["mpo", "dense"])
def test_no_tokens_have_gradients_too_and_padding_none(expert_type: str) -> None:
    layer = MPOEFeedForward(12, 20, MPOEConfig(num_experts=3, expert_type=expert_type, shape="separable")).train()
    x = torch.zeros(2, 0, 12, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    x = torch.randn(1, 4, 12)
    x[0, 3] = float("nan")
    y = layer(x, torch.tensor([[True, True, True, False]]))
    assert bool((y[0, 3] == 0).all())
    y.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or bool(torch.isfinite(parameter.grad).all()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tokens_are_brought_to_the_experts_dtype(dtype: torch.dtype) -> None:
    layer = MPOEFeedForward(8, 16, MPOEConfig(num_experts=2, shape="separable")).eval()
    x = torch.randn(3, 8).to(dtype)
    found = layer(x)
    assert found.dtype == torch.float32  # as documented
    assert torch.equal(found, layer(x.float()))
    with pytest.raises(TypeError, match="dtype"):
        MPOLinear(8, 4)(x)


@pytest.mark.parametrize("gated", [False, True])
def test_one_config_means_the_same_in_a_layer_and_in_a_model(gated: bool) -> None:
    config = MPOEConfig(num_experts=3)
    layer = MPOEFeedForward(8, 32, config, activation="silu", gated=gated, bias=not gated, init_std={"up": 0.5})
    sizes = {"hidden_size": 8, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = convert_to_mpoe(LlamaModel(LlamaConfig(vocab_size=9, num_key_value_heads=2, **sizes)), config)
    converted = model.layers[0].mlp
    assert isinstance(layer, MPOEFeedForward)
    assert layer.router.top_k == converted.router.top_k == 2
    experts = dict(layer.experts.auxiliary)
    assert {"right", "left", *(["right_gate"] if gated else [])} == set(experts)
    assert {block.shape for block in experts.values()} == {converted.experts.auxiliary["right"].shape}
    x = torch.randn(2, 3, 8)
    u = nn.functional.silu(layer.gate_proj(x)) * layer.up(x) if gated else nn.functional.silu(layer.up(x))
    torch.testing.assert_close(layer(x), layer.down(u))  # experts begin as identities
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), layer(x))
    noisy = MPOEFeedForward(8, 32, MPOEConfig(num_experts=3, auxiliary_noise=0.1))
    assert not torch.equal(noisy.experts.auxiliary["right"][0], noisy.experts.auxiliary["right"][1])


def test_a_layer_that_trains_alone_says_that_nothing_balances_it() -> None:
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
    with pytest.warns(UserWarning, match=r"nothing adds its balancing loss: run it in mpoe\.layers\.routing_context"):
        layer.train()(x)
