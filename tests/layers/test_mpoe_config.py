"""`MPOEConfig` and `RouterConfig`: every field is checked at construction, and both survive JSON."""

from __future__ import annotations

import json

import pytest

from mpoe.config import MPOEConfig, RouterConfig
from mpoe_kernels import MPOShape


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1; got 0"),
        ({"num_experts": True}, TypeError, "num_experts"),
        ({"expert_type": "mop"}, ValueError, "did you mean 'mpo'"),
        ({"shape": "sepparable"}, ValueError, "did you mean 'separable'"),
        ({"shape": 3}, TypeError, "shape must be"),
        ({"shape": {"up": {"in_factors": [2], "out_factors": [3]}}}, ValueError, "missing ['down']"),
        ({"shape": {"upp": {}}}, ValueError, "did you mean 'up'"),
        ({"max_bond": 0}, ValueError, "max_bond"),
        ({"gauge": "symetric"}, ValueError, "did you mean 'symmetric'"),
        ({"auxiliary_noise": -1.0}, ValueError, "auxiliary_noise"),
        ({"router": {"topk": 2}}, ValueError, "did you mean 'top_k'"),
        ({"router": 3}, TypeError, "router"),
        ({"num_experts": 2, "router": {"top_k": 3}}, ValueError, "top_k must be at most num_experts = 2; got 3"),
        ({"target_modules": "fnn"}, ValueError, "did you mean 'ffn'"),
        ({"target_modules": []}, TypeError, "target_modules"),
        ({"exclude_modules": "x"}, TypeError, "exclude_modules"),
        ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform"),
        ({"backend": 1}, TypeError, "backend"),
        ({"light_p": 0}, ValueError, "light_p"),
        ({"separable_left": 0}, ValueError, "separable_left"),
    ],
)
def test_refusals_name_the_field(values, error, words):
    with pytest.raises(error) as caught:
        MPOEConfig(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_k": 0}, "top_k"),
        ({"capacity_factor": 0.0}, "capacity_factor"),
        ({"eval_capacity_factor": -1}, "eval_capacity_factor"),
        ({"jitter": 1.0}, "jitter must be below 1"),
        ({"balance_loss_weight": -1}, "balance_loss_weight"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight"),
        ({"expert_dropout": 1.0}, "expert_dropout"),
        ({"init_scale": -0.1}, "init_scale"),
    ],
)
def test_router_refusals(values, words):
    with pytest.raises(ValueError) as caught:
        RouterConfig(**values)
    assert words in str(caught.value)


def test_unknown_fields_offer_close_matches():
    with pytest.raises(ValueError, match="did you mean 'num_experts'"):
        MPOEConfig.from_dict({"num_expert": 4})
    with pytest.raises(TypeError, match="MPOEConfig has no field 'num_expert' \\(did you mean 'num_experts'"):
        MPOEConfig(num_expert=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="RouterConfig has no field 'topk' \\(did you mean 'top_k'"):
        RouterConfig(topk=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "config",
    [
        MPOEConfig(),
        MPOEConfig(shape="separable"),
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
