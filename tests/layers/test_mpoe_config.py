"""`MPOEConfig` and `RouterConfig`: every field is checked at construction, and both survive JSON."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest

from mpoe.config import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape


@pytest.mark.parametrize(
    ("kind", "values", "error", "words"),
    [
        (MPOEConfig, {"num_experts": 0}, ValueError, "num_experts must be at least 1; got 0"),
        (MPOEConfig, {"num_experts": True}, TypeError, "num_experts"),
        (MPOEConfig, {"expert_type": "mop"}, ValueError, "did you mean 'mpo'"),
        (MPOEConfig, {"shape": "sepparable"}, ValueError, "did you mean 'separable'"),
        (MPOEConfig, {"shape": 3}, TypeError, "shape must be"),
        (MPOEConfig, {"shape": {"up": {"in_factors": [2], "out_factors": [3]}}}, ValueError, "missing ['down']"),
        (MPOEConfig, {"shape": {"upp": {}}}, ValueError, "did you mean 'up'"),
        (MPOEConfig, {"gauge": "symetric"}, ValueError, "did you mean 'symmetric'"),
        (MPOEConfig, {"auxiliary_noise": -1.0}, ValueError, "auxiliary_noise"),
        (MPOEConfig, {"router": {"topk": 2}}, ValueError, "did you mean 'top_k'"),
        (MPOEConfig, {"num_experts": 2, "router": {"top_k": 3}}, ValueError, "at most num_experts = 2; got 3"),
        (MPOEConfig, {"target_modules": "fnn"}, ValueError, "did you mean 'ffn'"),
        (MPOEConfig, {"layers_to_transform": [-1]}, ValueError, "layers_to_transform"),
        (MPOEConfig, {"separable_left": 0}, ValueError, "separable_left"),
        (MPOEConfig, {"moe_type": "mop"}, ValueError, "did you mean 'moe'"),
        (MPOEConfig, {"moe_type": "moe", "router": RouterConfig(top_k=2)}, ValueError, "router with a second_policy"),
        (MPOEConfig, {"router": RouterConfig.gshard()}, ValueError, "router with second_policy None; got 'random'"),
        (MPOEConfig, {"moe_type": "moe", "router": {"top_k": 1}}, ValueError, "second_policy needs top_k 2; got 1"),
        (MPOEConfig, {"moe_type": "moe", "router": {"second_policy": "rand"}}, ValueError, "did you mean 'random'"),
        (MPOEConfig, {"moe_type": "moe", "num_experts": 1}, ValueError, "top_k must be at most num_experts = 1; got 2"),
        (MPOEConfig, {"router": {"eval_second_policy": "all"}}, ValueError, "eval_second_policy needs second_policy"),
        (MPOEConfig, {"router": {"second_threshold": 0.0}}, ValueError, "second_threshold must be greater than 0"),
        (MPOEConfig, {"router": {"min_capacity": 0}}, ValueError, "min_capacity must be at least 1"),
        (RouterConfig, {"top_k": 0}, ValueError, "top_k"),
        (RouterConfig, {"capacity_factor": 0.0}, ValueError, "capacity_factor"),
        (RouterConfig, {"eval_capacity_factor": -1}, ValueError, "eval_capacity_factor"),
        (RouterConfig, {"jitter": 1.0}, ValueError, "jitter must be below 1"),
        (RouterConfig, {"balance_loss_weight": -1}, ValueError, "balance_loss_weight"),
        (RouterConfig, {"z_loss_weight": float("nan")}, ValueError, "z_loss_weight"),
        (RouterConfig, {"expert_dropout": 1.0}, ValueError, "expert_dropout"),
        (RouterConfig, {"init_scale": -0.1}, ValueError, "init_scale"),
        (RouterConfig, {"scoring_func": "tanh"}, ValueError, "must be one of 'softmax', 'sigmoid'; got 'tanh'"),
        (RouterConfig, {"routed_scaling_factor": 0.0}, ValueError, "routed_scaling_factor must be greater than 0"),
        (RouterConfig, {"bias_update_rate": -1.0}, ValueError, "bias_update_rate must be at least 0"),
        (
            RouterConfig,
            {"top_k": 2, "second_policy": "all", "scoring_func": "sigmoid"},
            ValueError,
            "second_policy needs scoring_func 'softmax' and bias_update_rate 0",
        ),
    ],
)
def test_refusals_name_the_field(kind, values, error, words):
    with pytest.raises(error) as caught:
        kind(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "odd", "known"), [(MPOEConfig, "num_expert", "num_experts"), (RouterConfig, "topk", "top_k")]
)
def test_unknown_fields_offer_close_matches(kind, odd, known):
    with pytest.raises(ValueError, match=f"did you mean '{known}'"):
        kind.from_dict({odd: 4})
    with pytest.raises(TypeError, match=rf"{kind.__name__} has no field '{odd}' \(did you mean '{known}'"):
        kind(**{odd: 4})


@pytest.mark.parametrize(
    "config",
    [
        MPOEConfig(),
        MPOEConfig(shape="separable"),
        *(MPOEConfig(moe_type=moe_type, router={"jitter": 0.1}) for moe_type in ("switch", "moe", "none")),
        MPOEConfig(
            num_experts=3,
            shape={"up": MPOShape.paper(48, 96), "down": MPOShape.paper(96, 48)},
            router=RouterConfig(top_k=2, capacity_factor=1.25),
            target_modules=["ffn", "attention"],
            exclude_modules=["h.0.mlp"],
            layers_to_transform=[1],
            rate_ratios={"a": [1.0, 2.0]},
        ),
    ],
)
def test_json_round_trip(config):
    again = MPOEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_shapes_by_name():
    up = MPOEConfig(shape="separable").shape_for("up", 768, 3072)
    assert up == MPOShape.separable(768, 3072)
    assert MPOEConfig(shape="separable").shape_for("down", 3072, 768) == up.mirrored()
    assert MPOEConfig(shape="separable").shape_for("gate_proj", 768, 3072) == up
    left = MPOEConfig(separable_left=128, separable_right=32).shape_for("up", 768, 3072)
    assert (left.in_factors[0], left.out_factors[-1]) == (128, 32)
    assert MPOEConfig(shape="paper", max_bond=9).shape_for("up", 768, 3072) == MPOShape.paper(768, 3072, max_bond=9)
    assert MPOEConfig(shape="light", light_p=16).shape_for("up", 48, 96) == MPOShape.light(48, 96, 16)


def test_given_shapes_must_fit_the_weight():
    config = MPOEConfig(shape={"up": MPOShape.paper(48, 96), "down": MPOShape.paper(96, 48)})
    assert config.shape_for("gate_proj", 48, 96) == MPOShape.paper(48, 96)
    with pytest.raises(ValueError, match=r"\[32, 96\].*\[48, 96\]"):
        config.shape_for("up", 32, 96)


@pytest.mark.parametrize(
    "ratios", [3, {"up": 1.0}, {"up": "12"}, {"up": [None]}, {"up": [-1.0]}, {"up": [float("nan")]}]
)
def test_rate_ratios_are_lists_of_numbers(ratios: object) -> None:
    with pytest.raises((TypeError, ValueError), match="rate_ratios"):
        MPOEConfig(rate_ratios=ratios)


# ------------------------------------------------------------- without a shape


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
    "gshard": {"moe_type": "moe"},
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
    assert (config.shape, config.top_k) == ("separable", 2 if config.moe_type == "moe" else 1)


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
