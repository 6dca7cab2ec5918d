"""`MPOEConfig` and `RouterConfig`: every field is checked, and both survive JSON; what `moe_type`
computes."""

import copy
import dataclasses
import json
import math
import re

import pytest
import torch
from torch.testing import assert_close

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.layers import MPOEFeedForward, TopKRouter, routing_context
from mpoe_kernels import MPOShape
from tests.assertions import refuses
from tests.cases import either

# What raises the error -> fields, and what the message says.
REFUSED = {
    (MPOEConfig, ValueError): {
        "num_experts must be at least 1; got 0": {"num_experts": 0},
        "did you mean 'mpo'": {"expert_type": "mop"},
        "did you mean 'separable'": {"shape": "sepparable"},
        "missing ['down']": {"shape": {"up": {"in_factors": [2], "out_factors": [3]}}},
        "did you mean 'up'": {"shape": {"upp": {}}},
        "did you mean 'symmetric'": {"gauge": "symetric"},
        "at most num_experts = 2; got 3": {"num_experts": 2, "router": {"top_k": 3}},
        "did you mean 'ffn'": {"target_modules": "fnn"},
        "layers_to_transform": {"layers_to_transform": [-1]},
        "separable_left": {"separable_left": 0},
        "did you mean 'moe'": {"moe_type": "mop"},
        "router with a second_policy": {"moe_type": "moe", "router": RouterConfig(top_k=2)},
        "router with second_policy None; got 'random'": {"router": RouterConfig.gshard()},
        "second_policy needs top_k 2; got 1": {"moe_type": "moe", "router": {"top_k": 1}},
        "did you mean 'random'": {"moe_type": "moe", "router": {"second_policy": "rand"}},
        "eval_second_policy needs second_policy": {"router": {"eval_second_policy": "all"}},
        "second_threshold must be greater than 0": {"router": {"second_threshold": 0.0}},
        "min_capacity must be at least 1": {"router": {"min_capacity": 0}},
        "block_size must be at least 1": {"shape": "hidden", "block_size": 0},
        "neurons needs shape 'neurons'; got 'hidden'": {"shape": "hidden", "neurons": 8},
        "block_size needs shape 'hidden'; got 'neurons'": {"shape": "neurons", "block_size": 8},
        "needs moe_type 'switch' or 'none'": {"shape": "hidden", "moe_type": "moe"},
        "router.capacity_factor": {"shape": "hidden", "router": {"capacity_factor": 1.0}},
        "routed_scaling_factor needs shape": {"router": {"routed_scaling_factor": 2.0}},
        "routed_scaling_factor needs shape 'neurons'": {
            "shape_pattern": {"encoder": "neurons"},
            "router": {"routed_scaling_factor": 2.0},
        },
    },
    (MPOEConfig, TypeError): {
        "num_experts": {"num_experts": True},
        "shape must be": {"shape": 3},
        "['up'] must be an MPOShape or its mapping; got int": {"shape": {"up": 3, "down": 3}},
        "block_per_group must be True or False": {"shape": "hidden", "block_per_group": 1},
        "neurons must be an integer or None": {"shape": "neurons", "neurons": 8.0},
    },
    (RouterConfig, ValueError): {
        "top_k": {"top_k": 0},
        "capacity_factor": {"capacity_factor": 0.0},
        "eval_capacity_factor": {"eval_capacity_factor": -1},
        "jitter must be below 1": {"jitter": 1.0},
        "balance_loss_weight": {"balance_loss_weight": -1},
        "z_loss_weight": {"z_loss_weight": float("nan")},
        "expert_dropout": {"expert_dropout": 1.0},
        "init_scale": {"init_scale": -0.1},
        "must be one of 'softmax', 'sigmoid'; got 'tanh'": {"scoring_func": "tanh"},
        "routed_scaling_factor must be greater than 0": {"routed_scaling_factor": 0.0},
        "bias_update_rate must be at least 0": {"bias_update_rate": -1.0},
        "second_policy needs scoring_func 'softmax' and bias_update_rate 0": {
            "top_k": 2,
            "second_policy": "all",
            "scoring_func": "sigmoid",
        },
    },
}


@pytest.mark.parametrize(
    "kind, error, values, words",
    [
        (*raised, values, words)
        for raised, rows in REFUSED.items()
        for words, values in rows.items()
    ],
)
def test_refusals_name_the_field(kind, error, values, words):
    refuses(error, re.escape(words), kind, **values)


@pytest.mark.parametrize(
    "kind, misspelt, known",
    [(MPOEConfig, "num_expert", "num_experts"), (RouterConfig, "topk", "top_k")],
)
def test_unknown_fields_offer_close_matches(kind, misspelt, known):
    refuses(ValueError, f"did you mean '{known}'", kind.from_dict, {misspelt: 4})
    refuses(
        TypeError,
        rf"{kind.__name__} has no field '{misspelt}' \(did you mean '{known}'",
        kind,
        **{misspelt: 4},
    )


@pytest.mark.parametrize(
    "config",
    [
        MPOEConfig(),
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
    assert MPOEConfig(shape="paper", max_bond=9).shape_for("up", 768, 3072) == MPOShape.paper(
        768, 3072, max_bond=9
    )
    assert MPOEConfig(shape="light", light_p=16).shape_for("up", 48, 96) == MPOShape.light(
        48, 96, 16
    )


def test_given_shapes_must_fit_the_weight():
    config = MPOEConfig(shape={"up": MPOShape.paper(48, 96), "down": MPOShape.paper(96, 48)})
    assert config.shape_for("gate_proj", 48, 96) == MPOShape.paper(48, 96)
    refuses(ValueError, r"\[32, 96\].*\[48, 96\]", config.shape_for, "up", 32, 96)


@pytest.mark.parametrize(
    "ratios", [3, {"up": 1.0}, {"up": "12"}, {"up": [None]}, {"up": [-1.0]}, {"up": [float("nan")]}]
)
def test_rate_ratios_are_lists_of_numbers(ratios):
    refuses((TypeError, ValueError), "rate_ratios", MPOEConfig, rate_ratios=ratios)


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
}


def test_a_new_one_is_hidden_with_two_experts_per_token():
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
def test_what_other_shapes_have_alone_selects_separable(case):
    config = MPOEConfig(**CORES_ALONE[case])
    assert (config.shape, config.top_k) == ("separable", 2 if config.moe_type == "moe" else 1)


@pytest.mark.parametrize(
    "values, shape, top_k",
    [
        ({}, "separable", 1),
        ({"num_experts": 4, "router": {"jitter": 0.1}}, "separable", 1),
        ({"shape": "hidden"}, "hidden", 1),
        ({"shape": "hidden", "router": {"top_k": 4}}, "hidden", 4),
        ({"moe_type": "moe", "router": {"second_policy": "all"}}, "separable", 2),
    ],
)
def test_a_saved_one_means_what_it_meant(values, shape, top_k):
    config = MPOEConfig.from_dict(values)
    assert (config.shape, config.top_k) == (shape, top_k)
    assert MPOEConfig.from_dict(config.to_dict()) == config


def test_a_chosen_shape_stays():
    config = MPOEConfig(num_experts=4)
    assert dataclasses.replace(config, max_bond=4).shape == "hidden"
    assert copy.deepcopy(config) == config
    assert MPOEConfig(max_bond=4, shape="hidden").shape == "hidden"
    config = {"shape": "neurons", "neurons": 8, "latent": 6}
    assert (
        MPOEConfig(expert_type="dense", **config).top_k == 1
    )  # flags of the mixture that a Switch is compared with
    config = MPOEConfig(**config, shape_pattern={"wo": 16, "wi": "paper"})
    assert [config.for_experts(name).latent for name in ("wo", "wi")] == [6, None]


def test_cores_where_blocks_cannot_stand():
    assert MPOEConfig(num_experts=4).with_cores() == MPOEConfig(num_experts=4, shape="separable")
    asked = MPOEConfig(num_experts=4, router={"top_k": 2, "jitter": 0.1}).with_cores()
    assert asked == MPOEConfig(num_experts=4, shape="separable", router={"top_k": 2, "jitter": 0.1})
    assert copy.deepcopy(MPOEConfig()).with_cores().shape == "separable"
    assert MPOEConfig(shape="hidden").with_cores().shape == "hidden"


# ------------------------------------------------------------------ moe_type


TOKENS, EXPERTS = 40, 4


def gshard(**values):
    return TopKRouter(
        6, EXPERTS, RouterConfig.gshard(capacity_factor=None, eval_capacity_factor=None, **values)
    )


@pytest.mark.parametrize("policy", ["all", "none", "threshold"])
@either("raw")
def test_gating_by_hand(policy, raw):
    """Gates of the kept choices sum to 1, a lone one has the gradient of log p; dropped ones take
    no slot."""
    router = gshard(second_policy=policy, second_threshold=0.48, init_scale=4.0, is_scale_prob=raw)
    x, mask = torch.randn(TOKENS, 6), torch.arange(TOKENS) % 5 > 0
    p, index = torch.softmax(x @ router.weight.T, -1).topk(2)
    share = (p[:, 1] / p.sum(-1)).detach()
    second = {"all": share > -1, "none": share > 2, "threshold": share > 0.48}[policy]
    kept = torch.stack([torch.ones_like(second), second], 1)
    gates = p * kept
    if not raw:
        gates = gates / torch.where(second, p.sum(-1), p[:, 0].detach())[:, None]
    decision, factors = router(x), torch.randn(TOKENS, 2)
    assert torch.equal(decision.top_k_index, index)
    assert torch.equal(decision.kept, kept)
    assert policy != "threshold" or 0 < int(second.sum()) < TOKENS
    assert_close(decision.top_k_weights, gates)
    found, wanted = (
        torch.autograd.grad((g * factors).sum(), router.weight)
        for g in (decision.top_k_weights, gates)
    )
    assert_close(found, wanted)
    routing, used = router.route(decision, mask), kept & mask[:, None]
    assert torch.equal(routing.expert_load.long(), torch.bincount(index[used], minlength=EXPERTS))
    assert torch.equal(routing.slot_of_token >= 0, used)
    tokens = torch.arange(TOKENS)[:, None].expand(-1, 2)
    assert torch.equal(routing.token_of_slot[routing.slot_of_token[used]], tokens[used])


def test_a_second_choice_at_the_threshold_is_dropped():
    router = gshard(
        second_policy="threshold", second_threshold=0.5, init_scale=0.0
    )  # both gates are equal
    assert not router(torch.randn(3, 6)).kept[:, 1].any()


def test_random_policy_keeps_seconds_in_proportion_to_their_share():
    router, x = (
        gshard(second_policy="random", second_threshold=0.8),
        torch.randn(1, 6).expand(20_000, 6),
    )
    p = torch.softmax(x[0] @ router.weight.T, -1).topk(2).values.tolist()
    expected = p[1] / sum(p) / 0.8
    assert float(router(x).kept[:, 1].float().mean()) == pytest.approx(expected, abs=0.02)
    router.eval()
    assert router(x).kept.all()  # evaluation is repeatable: all are kept


@pytest.mark.parametrize("training, factor", [(True, 1.25), (False, 2.0)])
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
    alone = MPOEFeedForward(
        24, 48, MPOEConfig(moe_type="none", expert_type="dense"), activation="gelu"
    )
    for kind, projection in ffn.experts.projections().items():
        projection.load_weight_(alone.experts.projections()[kind].weight[0])
    x = torch.randn(3, 7, 24, requires_grad=True)
    y, expected = ffn(x), alone(x)
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(y)
    (got,) = torch.autograd.grad((ffn(x) * weights).sum(), x)
    assert torch.isfinite(got).all()


def test_balancing_loss_counts_first_choices():
    ffn = MPOEFeedForward(24, 48, MPOEConfig(moe_type="moe", num_experts=EXPERTS))
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
    expected = (
        torch.relu(x @ weights["up"] + ffn.experts.up.bias) @ weights["down"]
        + ffn.experts.down.bias
    )
    assert_close(y, expected * mask[:, None], rtol=1e-4, atol=1e-5)
    assert routing.records == []


def test_a_block_size_is_of_hidden_experts_alone():
    config = MPOEConfig(block_size=8, shape_pattern={"a": "separable"})
    assert (config.for_experts("a").block_size, config.for_experts("b").block_size) == (None, 8)
    config = MPOEConfig(shape="separable", block_size=8, shape_pattern={"a": "hidden"})
    assert config.for_experts("a").block_size == 8
    config = MPOEConfig(shape="neurons", shape_pattern={"a": "separable"})
    assert config.for_experts("a").neurons is None
    saved = {"shape": "separable", "block_size": 8}  # had no effect when it was written
    assert MPOEConfig.from_dict(saved).block_size is None
