"""The numbers behind `mpoe plan`: against converted models, and by hand."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import AutoConfig, GPT2LMHeadModel, T5ForConditionalGeneration

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe
from mpoe.estimation.costs import Usage, model_costs
from mpoe.estimation.inventory import take_inventory

T5 = {"model_type": "t5", "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
GATED = {**T5, "feed_forward_proj": "gated-gelu"}
GPT2 = {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_positions": 16}


def work(tokens: int = 2048, training: bool = True, dtype: torch.dtype = torch.bfloat16, **more) -> Usage:
    return Usage(dict.fromkeys(("main", "encoder", "decoder"), tokens), dtype, training, **more)


@pytest.mark.parametrize("values", [T5, GATED, GPT2], ids=["t5", "gated", "gpt2"])
@pytest.mark.parametrize(
    "shape",
    [
        {"shape": "separable"},
        {"shape": "paper", "max_bond": 8},
        {"shape": "light", "light_p": 16},
        {"shape": "hidden"},
        {"shape": "hidden", "block_size": 16, "block_per_group": False},
        {"shape": "neurons", "neurons": 8},
        {"shape": "neurons", "neurons": 8, "latent": 16},
        {"shape": "neurons", "neurons": 8, "expert_bias": True},
    ],
    ids=str,
)
def test_parameters_are_those_of_the_converted_model(tmp_path, values: dict, shape: dict) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = MPOEConfig(num_experts=3, **shape)
    costs = model_costs(take_inventory(str(tmp_path)), config, work())["totals"]["whole"]
    cls = GPT2LMHeadModel if values is GPT2 else T5ForConditionalGeneration
    own = {k: v for k, v in values.items() if k != "model_type"}
    model = cls(AutoConfig.for_model(values["model_type"], **own))
    report = convert_to_mpoe(model, config).parameter_report()
    assert costs["mpoe"]["parameters"] == report["total"]
    assert costs["switch"]["parameters"] == report["switch_total"]
    assert costs["dense"]["parameters"] == report["dense_total"]


@pytest.mark.parametrize(("training", "products"), [(False, (1, 1)), (True, (4, 3))])
def test_hidden_side_blocks_add_their_products(tmp_path, training: bool, products: tuple[int, int]) -> None:
    """FLOPs 1 + k b / I forward, 1 + 7/6 k b / I with the backward pass, which recomputes; no rows are copied."""
    (tmp_path / "config.json").write_text(json.dumps(T5))
    config = MPOEConfig(shape="hidden", num_experts=8, block_size=16, router=RouterConfig(top_k=2))
    matrices = model_costs(take_inventory(str(tmp_path)), config, work(training=training))["layers"][0]["matrices"]
    for matrix, count in zip(matrices, products, strict=True):
        assert matrix["mpoe"]["flops"] - matrix["dense"]["flops"] == 2 * 2048 * 2 * 128 * 16 * count
        assert matrix["strategy"] == "hidden"
    flops = sum(m["mpoe"]["flops"] for m in matrices) / sum(m["dense"]["flops"] for m in matrices)
    assert flops == pytest.approx(1 + (7 / 6 if training else 1) * 2 * 16 / 64)


@pytest.mark.parametrize("latent", [None, 16])
@pytest.mark.parametrize("values", [T5, GATED], ids=["t5", "gated"])
def test_neurons_add_their_products(tmp_path, values: dict, latent: int | None) -> None:
    """As `NeuronFeedForward.relative_flops`; with the backward pass, which recomputes, 4, 4 and 3 products."""
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = MPOEConfig(shape="neurons", num_experts=8, neurons=8, latent=latent, router=RouterConfig(top_k=2))
    inventory = take_inventory(str(tmp_path))
    for training in (False, True):
        matrices = model_costs(inventory, config, work(training=training))["layers"][0]["matrices"]
        row = 64 if latent is None else latent
        for matrix in matrices:
            products = {"up": 4, "gate_proj": 4, "down": 3}[matrix["kind"]] if training else 1
            shared = 0 if latent is None or matrix["kind"] == "gate_proj" else 64 * latent * (3 if training else 1)
            added = matrix["mpoe"]["flops"] - matrix["dense"]["flops"]
            assert added == 2 * 2048 * (2 * 8 * row * products + shared)
            assert matrix["strategy"] == "neurons"
            assert matrix["lossless"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("t5-small", 60_506_624),
        ("t5-3b", 2_851_598_336),
        ("t5-11b", 11_307_321_344),
        ("t5-v1_1-base", 247_577_856),
        ("flan-t5-xxl", 11_135_332_352),
        ("gpt2-xl", 1_557_611_200),
        ("bert-large-uncased", 335_141_888),
    ],
)
def test_published_sizes(name: str, parameters: int) -> None:
    assert take_inventory(name).parameters == parameters


def test_one_dense_expert_costs_what_the_dense_layer_does() -> None:
    costs = model_costs(take_inventory("gpt2"), MPOEConfig(num_experts=1, shape="separable"), work())
    for layer in costs["layers"]:
        for matrix in layer["matrices"]:
            assert matrix["switch"] == matrix["dense"]


def test_masked_steps_cost_less() -> None:
    inventory = take_inventory("t5-base")
    plain = model_costs(inventory, MPOEConfig(shape="separable"), work())["totals"]["feed_forward"]
    masked = model_costs(inventory, MPOEConfig(shape="separable"), work(mask_central=True))["totals"]["feed_forward"]
    assert masked["mpoe"]["flops"] < plain["mpoe"]["flops"]
    assert masked["switch"] == plain["switch"]


def test_temporary_weights_stay_under_two_experts() -> None:
    for shape, experts in itertools.product(("paper", "light", "separable"), (8, 1024)):
        costs = model_costs(take_inventory("t5-large"), MPOEConfig(num_experts=experts, shape=shape), work())
        assert costs["totals"]["whole"]["mpoe"]["temporary_bytes"] <= 2 * 1024 * 4096 * 2
