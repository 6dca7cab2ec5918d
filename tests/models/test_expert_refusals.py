"""Experts as files: what is refused in words, with nothing half written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mpoe import (
    collect_statistics,
    compose_experts,
    convert_to_mpoe,
    load_expert,
    merge_expert,
    save_expert,
    start_expert,
)
from mpoe.config import MPOEConfig
from mpoe.models.expert_files import write_expert
from mpoe.models.expert_mixture import documentation_batches
from mpoe.models.kept import neuron_modules

from .domain_experts import VOCABULARY, M, stirred, tokenizer
from .small_models import dense_model
from .tiny_families import tiny_model


def test_other_bases_are_refused(domains: SimpleNamespace) -> None:
    other = copy.deepcopy(domains.base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    for refused in (
        lambda: start_expert(other, expert=domains.files[0]),
        lambda: merge_expert(other, domains.files[0]),
        lambda: compose_experts(other, domains.files, background=domains.background),
        lambda: merge_expert(copy.deepcopy(domains.base).to(torch.bfloat16), domains.files[0]),
    ):
        with pytest.raises(ValueError, match=r"'domain0' must be of this base.*LlamaForCausalLM"):
            refused()
    with pytest.raises(ValueError, match="MPOE model already"):
        merge_expert(start_expert(domains.base), domains.files[0])


def test_compositions_that_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    def compose(experts: Any, **options: Any) -> Any:
        return compose_experts(domains.base, experts, **{"background": domains.background, **options})

    with pytest.raises(ValueError, match="experts must differ; 'domain0' is there twice"):
        compose([domains.files[0], domains.files[1], domains.files[0]])
    for experts in ([], "ab", None):
        with pytest.raises(ValueError, match="experts must be a list"):
            compose(experts)
    with pytest.raises(ValueError, match="one tokenizer; the vocabularies of the tokenizer and expert 'domain0'"):
        compose(domains.files, tokenizer=tokenizer(7))
    with pytest.raises(TypeError, match="tokenizer must be"):
        compose(domains.files, tokenizer=3)
    save_expert(stirred(start_expert(domains.base, 4)), tmp_path / "bare.expert")
    with pytest.raises(ValueError, match="'bare' must hold statistics"):
        compose([*domains.files, tmp_path / "bare.expert"])
    with pytest.raises(ValueError, match="background must be batches or statistics, or tokenizer"):
        compose(domains.files, background=None)
    with pytest.raises(ValueError, match="top_k must be at most"):
        compose(domains.files, top_k=4)
    with pytest.raises(ValueError, match="background must hold mean"):
        compose(domains.files, background={"x": torch.ones(2)})
    with pytest.raises(ValueError, match="it does not make the model's tokens"):
        documentation_batches(dense_model("gpt2"), lambda text: {"input_ids": [VOCABULARY] * 100})


def test_damaged_files_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    file, whole = tmp_path / "a.expert", domains.files[0].read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_expert(file)
    file.write_bytes(whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:])
    with pytest.raises(ValueError, match="damaged"):
        load_expert(file)
    file.write_bytes(whole.replace(b"LlamaForCausalLM", b"LlamaForCausalLN"))
    with pytest.raises(ValueError, match="damaged"):
        load_expert(file)
    save_file({"x": torch.ones(2)}, file)
    with pytest.raises(ValueError, match="another safetensors file"):
        load_expert(file)
    with pytest.raises(ValueError, match="is no file"):
        load_expert(tmp_path)
    with pytest.raises(TypeError, match="path must be an expert's file"):
        load_expert(3)
    expert = load_expert(domains.files[0])
    expert.facts["format"] = 2
    write_expert(expert, file)
    with pytest.raises(ValueError, match=r"must be of format 1; got .*\"format\": 2"):
        load_expert(file)
    expert.facts["format"] = 1
    del expert.facts["base"]
    write_expert(expert, file)
    with pytest.raises(ValueError, match="must hold the facts base, base_name"):
        load_expert(file)
    with safe_open(domains.files[0], framework="pt") as opened:
        assert json.loads(opened.metadata()["expert"])["neurons"] == M


def test_contents_that_do_not_fit_are_refused(domains: SimpleNamespace, tmp_path: Path) -> None:
    expert, file = load_expert(domains.files[0]), tmp_path / "a.expert"
    name = next(iter(expert.weights))
    expert.weights[name] = expert.weights[name] * float("nan")
    write_expert(expert, file)
    with pytest.raises(ValueError, match="must have finite weights; NaN or Inf in"):
        load_expert(file)
    expert.weights[name] = torch.ones(3)
    with pytest.raises(ValueError, match=r"must have .* \(32, 32\); it has \(3,\)"):
        start_expert(domains.base, expert=expert)
    expert = load_expert(domains.files[0])
    mean = next(name for name in expert.statistics if name.endswith("mean"))
    for odd in (torch.full_like(expert.statistics[mean], float("nan")), torch.ones(3)):
        expert.statistics[mean] = odd
        with pytest.raises(ValueError, match="the statistics of expert 'domain0' must hold finite numbers"):
            compose_experts(domains.base, [expert], background=domains.background)


def test_saves_that_are_refused(tmp_path: Path) -> None:
    base = dense_model("llama")
    model, file = start_expert(base, 8), tmp_path / "an.expert"
    mixture = convert_to_mpoe(base, MPOEConfig(shape="neurons", neurons=4))
    latent = convert_to_mpoe(base, MPOEConfig(moe_type="none", shape="neurons", neurons=4, latent=4))
    for odd in (base, mixture, latent, convert_to_mpoe(base)):
        with pytest.raises(TypeError, match="model must have one expert"):
            save_expert(odd, file)
    with pytest.raises(TypeError, match="path must be the path of a file"):
        save_expert(model, 3)
    for path in (tmp_path, tmp_path / "absent" / "an.expert"):
        with pytest.raises(ValueError, match="path must be of a file in a folder that is there"):
            save_expert(model, path)
    with pytest.raises(TypeError, match="training must hold what JSON can"):
        save_expert(model, file, training={"x": base})
    with pytest.raises(TypeError, match="training must hold what JSON can"):
        save_expert(model, file, training={"loss": float("nan")})
    with pytest.raises(TypeError, match="training must be a mapping of facts; got int"):
        save_expert(model, file, training=3)
    with pytest.raises(TypeError, match="statistics must be a mapping"):
        save_expert(model, file, statistics=[1])
    with pytest.raises(TypeError, match="tokenizer must be a tokenizer"):
        save_expert(model, file, tokenizer="a")
    next(iter(neuron_modules(model).values())).experts.up.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite weights"):
        save_expert(model, file)
    assert not list(tmp_path.iterdir())


def test_statistics_that_are_refused() -> None:
    base = dense_model("llama")
    with pytest.raises(TypeError, match="model must have an expert"):
        collect_statistics(base, [])
    with pytest.raises(ValueError, match="shape 'neurons'"):
        collect_statistics(convert_to_mpoe(base), [])
    model = start_expert(base, 8)
    for rank in (-1, 25, True, 1.5):
        with pytest.raises(ValueError, match="rank must be an integer from 0 to the model size 24"):
            collect_statistics(model, [], rank=rank)
    with pytest.raises(ValueError, match="batches must hold tokens"):
        collect_statistics(model, [])
    for odd in (3, {"input_ids": [1, 2]}):
        with pytest.raises(TypeError, match="batches must hold tensors by argument of the model"):
            collect_statistics(model, [odd])
    embeds = torch.full((1, 4, 24), float("nan"))
    with pytest.raises(ValueError, match="finite inputs"):
        collect_statistics(model, [{"inputs_embeds": embeds}])


def test_networks_without_a_module_are_refused() -> None:
    with pytest.raises(ValueError, match="shape 'neurons' needs"):
        start_expert(tiny_model("opt", "OPTForCausalLM"))
