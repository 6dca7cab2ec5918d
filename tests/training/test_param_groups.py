"""Rates, decay and freezing of the optimizer's parameter groups."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers import MPOEFeedForward, MPOLinear
from mpoe.models.report import hidden_modules, mpo_modules
from mpoe.training import MPOETrainingArguments, build_param_groups, describe_param_groups, freeze_cores
from mpoe.training.freezing import component_of
from mpoe_kernels import MPOShape

from .tiny import Toy, mpoe_model


def arguments(tmp_path: Path, **kwargs: Any) -> MPOETrainingArguments:
    return MPOETrainingArguments(output_dir=str(tmp_path), learning_rate=1e-3, weight_decay=0.1, **kwargs)


def rates(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float, str]]:
    found = {id(p): (g["lr"], g["weight_decay"], g["kind"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups), "a parameter is in two groups"
    return found


def pretrained_toy(gauge: str = "symmetric") -> Toy:
    """Cores decomposed from weights, so that their ratios differ from each other."""
    model = Toy()
    for _, cores in mpo_modules(model):
        cores.load_weight_(torch.randn(cores.shape.in_features, cores.shape.out_features) * 0.05, gauge)
    return model


@pytest.mark.parametrize("gauge", ["symmetric", "orthogonal"])
@pytest.mark.parametrize(
    ("options", "base", "central", "auxiliary"),
    [
        ({}, 1e-3, 0.35, 0.5),
        ({"regime": "scratch"}, 1e-3, 1.0, 0.1),
        ({"mpo_lr": 2e-4}, 2e-4, 0.35, 0.5),
        ({"mpo_lr": 2e-4, "central_lr_scale": 0.25, "auxiliary_lr_scale": 3}, 2e-4, 0.25, 3.0),
    ],
)
def test_core_rates(
    tmp_path: Path, gauge: str, options: dict[str, Any], base: float, central: float, auxiliary: float
) -> None:
    model = pretrained_toy(gauge)
    found = rates(build_param_groups(model, arguments(tmp_path, **options)))
    for _, cores in mpo_modules(model):
        weight_rms = cores.dense_weights()[0].square().mean().sqrt().item()
        for index, core in enumerate(cores.chain()):
            scale = central if index == cores.shape.central else auxiliary
            expected = base * core.square().mean().sqrt().item() / weight_rms * scale
            assert found[id(core)][0] == pytest.approx(expected, rel=1e-4)


def test_one_raw_rate_without_scaling(tmp_path: Path) -> None:
    model = pretrained_toy()
    found = rates(build_param_groups(model, arguments(tmp_path, scale_core_lr=False, mpo_lr=5e-4)))
    cores = [core for _, module in mpo_modules(model) for core in module.chain()]
    assert {found[id(core)][0] for core in cores} == {5e-4}
    half = rates(build_param_groups(model, arguments(tmp_path, scale_core_lr=False, central_lr_scale=0.5)))
    assert {half[id(core)][0] for core in model.centrals()} == {5e-4}


def test_every_parameter_once_and_kinds(tmp_path: Path) -> None:
    model = pretrained_toy()
    found = rates(build_param_groups(model, arguments(tmp_path, router_lr_scale=2.0)))
    assert found.keys() == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        rate, decay, kind = found[id(parameter)]
        if ".central" in name or ".auxiliary" in name:
            assert kind == name.split("experts.")[1].split(".")[1]
        elif "router" in name:
            assert (kind, rate) == ("router", 2e-3)
        else:
            assert (kind, rate) == ("rest", 1e-3)
        assert decay == (0.0 if "bias" in name or "norm" in name else 0.1), name


def test_dense_experts_have_their_own_rate(tmp_path: Path) -> None:
    model = Toy(expert_type="dense")
    model.other = nn.Parameter(torch.ones(2, 2, 2))
    found = rates(build_param_groups(model, arguments(tmp_path, dense_expert_lr_scale=0.3)))
    assert found[id(model.other)] == (1e-3, 0.1, "rest")
    weights = [p for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
    assert len(weights) == 4
    for parameter in weights:
        assert found[id(parameter)] == (pytest.approx(3e-4), 0.1, "dense_expert")


def test_table(tmp_path: Path) -> None:
    groups = build_param_groups(pretrained_toy(), arguments(tmp_path))
    table = describe_param_groups(groups)
    assert table.splitlines()[0].split() == ["kind", "tensors", "parameters", "rate", "RMS", "ratio", "decay"]
    kinds = [line.split()[0] for line in table.splitlines()[1:]]
    assert kinds == ["rest", "rest", "router", "central", "auxiliary"]
    assert [line.split()[-1] for line in table.splitlines()[1:3]] == ["0.1", "0"]


def test_zero_weight_trains_at_the_unscaled_rate_with_a_warning(tmp_path: Path) -> None:
    model = Toy()
    model.layers[0].experts.up.rate_ratios = (0.5, 0.0, float("nan"))
    with pytest.warns(UserWarning, match=r"layers\.0\.experts\.up has unusable rate ratios"):
        found = rates(build_param_groups(model, arguments(tmp_path)))
    assert found[id(model.layers[0].experts.up.central)][0] == pytest.approx(0.35e-3)
    assert found[id(model.layers[0].experts.up.auxiliary[0])][0] == pytest.approx(0.25e-3)
    model.layers[0].experts.up.rate_ratios = (1.0,)
    with pytest.raises(ValueError, match="must hold 3 numbers, one per core; got 1"):
        build_param_groups(model, arguments(tmp_path))


# ------------------------------------------------------------------ freezing


class Mixed(nn.Module):
    """Names as in a T5: an FFN with three cores and an attention projection with five."""

    def __init__(self) -> None:
        super().__init__()
        self.DenseReluDense = MPOEFeedForward(32, 64, MPOEConfig(num_experts=2, shape="separable"), bias=True)
        self.SelfAttention = nn.Module()
        shape = MPOShape((2, 2, 2, 2, 2), (2, 2, 2, 2, 2))
        self.SelfAttention.q = MPOLinear(shape)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("encoder.block.0.layer.1.DenseReluDense.experts.up", "mlp"),
        ("decoder.block.3.layer.1.EncDecAttention.q.cores", "attention"),
        ("transformer.h.0.mlp.experts.down", "mlp"),
        ("transformer.h.0.attn.c_proj.cores", "attention"),
        ("bert.encoder.layer.2.attention.output.dense.cores", "attention"),
        ("bert.encoder.layer.2.feed_forward.experts.up", "mlp"),
        ("bert.embeddings.word_embeddings.cores", "word_embed"),
        ("shared.cores", "word_embed"),
        ("transformer.wte.cores", "word_embed"),
        ("bert.pooler.dense.cores", "pooler"),
    ],
)
def test_components(name: str, component: str) -> None:
    assert component_of(name) == component


def test_frozen_cores_are_in_no_group(tmp_path: Path) -> None:
    model = Toy()
    freeze_cores(model, tensor_learn=True)
    groups = build_param_groups(model, arguments(tmp_path))
    assert {g["kind"] for g in groups} == {"rest", "router", "auxiliary"}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build_param_groups(model, arguments(tmp_path))


def test_freezing_refusals() -> None:
    with pytest.raises(ValueError, match=r"names word_embed, but this model's MPO cores are in: attention, mlp"):
        freeze_cores(Mixed(), update_mpo_layer="word_embed")
    with pytest.raises(ValueError, match=r"must be below the number of cores \(here at most 5\); got '5'"):
        freeze_cores(Mixed(), train_AT_index="5")
    with pytest.raises(ValueError, match="Linear has none"):
        freeze_cores(nn.Linear(2, 2), tensor_learn=True)
    assert freeze_cores(nn.Linear(2, 2)) == {"frozen": 0, "trained": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        freeze_cores(Mixed())


def test_attention_biases_of_t5_are_not_decayed(tmp_path: Path) -> None:
    """They are tables [buckets, heads], so that their number of axes does not tell."""
    model = mpoe_model("t5")
    found = rates(build_param_groups(model, arguments(tmp_path)))
    tables = [p for name, p in model.named_parameters() if "relative_attention_bias" in name]
    assert len(tables) == 2
    assert [found[id(table)][1:] for table in tables] == [(0.0, "rest")] * 2
    assert found[id(model.get_input_embeddings().weight)][1] == 0.1


def test_blocks_of_hidden_experts_train_at_the_auxiliary_rate(tmp_path: Path) -> None:
    model = mpoe_model("gpt2", shape="hidden")
    found = rates(build_param_groups(model, arguments(tmp_path, mpo_lr=2e-4, auxiliary_lr_scale=3)))
    blocks = [p for layer in hidden_modules(model).values() for p in layer.experts.auxiliary.values()]
    assert blocks
    assert {found[id(block)][0] for block in blocks} == {2e-4 * 3}
    assert {found[id(block)][2] for block in blocks} == {"auxiliary"}
