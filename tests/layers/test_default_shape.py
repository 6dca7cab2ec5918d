"""What an `MPOEConfig` without a shape means: a new one, and a saved one."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from mpoe import convert_to_mpoe
from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, load_balancing_loss, routing_context
from mpoe.layers.feed_forward import _say_that_nothing_balances

CORES_ALONE = {
    "max_bond": {"max_bond": 8},
    "left": {"separable_left": 4},
    "right": {"separable_right": 4},
    "light_p": {"light_p": 64},
    "gauge": {"gauge": "symmetric"},
    "bond of a module": {"shape_pattern": {"wo": 4}},
    "capacity": {"router": RouterConfig(capacity_factor=1.0)},
    "capacity in evaluation": {"router": {"eval_capacity_factor": 2.0}},
    "none": {"moe_type": "none"},
    "dense": {"expert_type": "dense"},
    "existing": {"existing_experts": "mpo"},
}


def test_a_new_one_is_hidden_with_two_experts_per_token() -> None:
    router = RouterConfig(jitter=0.1)
    config = MPOEConfig(num_experts=8, router=router)
    assert (config.shape, config.top_k, config.is_hidden) == ("hidden", 2, True)
    assert config.router == RouterConfig(jitter=0.1, top_k=2)
    assert router.top_k is None  # the caller's object is not changed
    assert config.to_dict()["router"]["top_k"] == 2
    assert MPOEConfig(num_experts=1).top_k == 1
    assert MPOEConfig(router={"top_k": 4}).top_k == 4
    assert MPOEConfig(block_size=16, expert_bias=True, max_bond=None).is_hidden


@pytest.mark.parametrize("case", CORES_ALONE)
def test_what_other_shapes_have_alone_selects_separable(case: str) -> None:
    config = MPOEConfig(**CORES_ALONE[case])
    assert (config.shape, config.top_k) == ("separable", 1)


def test_gshard_keeps_its_two_experts() -> None:
    config = MPOEConfig(moe_type="moe")
    assert (config.shape, config.top_k) == ("separable", 2)


@pytest.mark.parametrize(
    ("values", "shape", "top_k"),
    [
        ({}, "separable", 1),
        ({"num_experts": 4, "router": {"jitter": 0.1}}, "separable", 1),
        ({"shape": "hidden"}, "hidden", 1),
        ({"shape": "hidden", "router": {"top_k": 4}}, "hidden", 4),
        ({"moe_type": "moe", "router": {"second_policy": "all"}}, "separable", 2),
    ],
)
def test_a_saved_one_means_what_it_meant(values: dict[str, Any], shape: str, top_k: int) -> None:
    config = MPOEConfig.from_dict(values)
    assert (config.shape, config.top_k) == (shape, top_k)
    assert MPOEConfig.from_dict(config.to_dict()) == config


def test_a_chosen_shape_stays() -> None:
    config = MPOEConfig(num_experts=4)
    assert dataclasses.replace(config, max_bond=4).shape == "hidden"
    assert copy.deepcopy(config) == config
    assert MPOEConfig(max_bond=4, shape="hidden").shape == "hidden"


def test_cores_where_blocks_cannot_stand() -> None:
    assert MPOEConfig(num_experts=4).with_cores() == MPOEConfig(num_experts=4, shape="separable")
    asked = MPOEConfig(num_experts=4, router={"top_k": 2, "jitter": 0.1}).with_cores()
    assert asked == MPOEConfig(num_experts=4, shape="separable", router={"top_k": 2, "jitter": 0.1})
    assert copy.deepcopy(MPOEConfig()).with_cores().shape == "separable"
    assert MPOEConfig(shape="hidden").with_cores().shape == "hidden"


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
