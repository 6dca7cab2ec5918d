"""Adapter mode: experts and routers train, nothing else, whatever their shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpoe import MPOEConfig, convert_to_mpoe, freeze_all_but_experts
from mpoe.cli.main import run
from mpoe.data import load_stand_in
from mpoe.data.embedded import stand_in_path
from mpoe.models.report import parameter_kind

from ..models.tiny_families import tiny_model

DENSE = {"expert_type": "dense"}


@pytest.mark.parametrize("config", [{}, {"shape": "separable"}, {"shape": "paper", "target_modules": ["ffn"]}, DENSE])
def test_what_trains(config: dict) -> None:
    model = convert_to_mpoe(load_stand_in("gpt2")[0], MPOEConfig(num_experts=2, **config))
    count = freeze_all_but_experts(model)
    assert count == model.parameter_report()["trainable"] > 0
    kinds = parameter_kind(model)
    for name, parameter in model.named_parameters():
        inside = {"experts", "router"} & set(name.split("."))
        assert parameter.requires_grad == bool(inside), name
        assert inside or kinds[name] in ("central", "rest"), name


@pytest.mark.parametrize(("family", "name"), [("mixtral", "MixtralForCausalLM"), ("phimoe", "PhimoeForCausalLM")])
@pytest.mark.parametrize("existing", ["keep", "mpo"])
def test_of_a_mixture(family: str, name: str, existing: str) -> None:
    dense = tiny_model(family, name)
    config = MPOEConfig(num_experts=4, existing_experts="mpo")
    model = convert_to_mpoe(dense, config) if existing == "mpo" else dense
    assert freeze_all_but_experts(model)
    trained = {part for n, p in model.named_parameters() if p.requires_grad for part in n.split(".")}
    assert "experts" in trained
    assert trained & {"gate", "router"}
    assert not any(p.requires_grad for n, p in model.named_parameters() if "self_attn" in n)


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ValueError, match=r"model must have experts .*; GPT2LMHeadModel has none"):
        freeze_all_but_experts(load_stand_in("gpt2")[0])


def test_of_the_command(sentiment: Path, tmp_path: Path) -> None:
    flags = ["--max_steps", "2", "--num_experts", "2", "--learning_rate", "1e-3", "--use_cpu", "--adapter"]
    run(["train", "--model", "t5", "--data_dir", str(sentiment), *flags, "--output_dir", str(tmp_path / "run")])
    before, after = (load_file(folder / "model.safetensors") for folder in (stand_in_path("t5"), tmp_path / "run"))
    assert all(torch.equal(value, after[name]) for name, value in before.items() if name in after)
    blocks = [value[0, 0] for name, value in after.items() if name.endswith("auxiliary.left")]
    assert not any(torch.equal(block, torch.eye(len(block))) for block in blocks)
    parameters = json.loads((tmp_path / "run" / "results.json").read_text())["parameters"]
    assert parameters["trainable"] == parameters["auxiliary"] + parameters["router"]
