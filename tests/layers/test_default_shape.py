"""What an `MPOEConfig` without a shape means: a new one, and a saved one."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, TopKRouter

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


def test_a_layer_of_its_own_is_separable() -> None:
    layer = MPOEFeedForward(8, 16, MPOEConfig(num_experts=3))
    assert layer.router is not None
    assert layer.router.top_k == 1
    assert layer.experts.up.shape == MPOEConfig(shape="separable").shape_for("up", 8, 16)
    assert TopKRouter(8, 3, RouterConfig()).top_k == 1
    assert layer(torch.randn(2, 8)).shape == (2, 8)
