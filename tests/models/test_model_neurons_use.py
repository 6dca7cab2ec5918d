"""What is done with models of neurons: masks, freezing, compilation, adapters, quantised weights, reports, rates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpoe import convert_to_mpoe, load_mpoe
from mpoe.inspection.growth import parameter_growth
from mpoe.models.card import model_card
from mpoe.models.kept import neuron_modules
from mpoe.models.report import parameter_kind, routed_layers
from mpoe.models.summary import HEADER, summarize
from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe.training.freezing import freeze_all_but_experts
from mpoe.training.gradient_mask import GradientMask
from mpoe.training.statistics import core_grad_norms

from .test_model_hidden import batch, dense, every_family, logits
from .test_model_neurons import both, config, stirred


@pytest.mark.slow
def test_remote_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    stirred(convert_to_mpoe(dense("llama"), config())).save_pretrained(tmp_path / "model")
    program = (
        "import sys, transformers\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model.model.layers[0].mlp).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model")], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "NeuronLlamaMLP", done.stderr
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), type(load_mpoe(tmp_path / "model")))


@every_family
@both
def test_masked_steps_leave_what_is_shared_alone(family: str, latent: int | None) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(latent=latent)))
    shared = {id(w) for layer in neuron_modules(model).values() for w in layer.central_parameters().values()}
    assert len(shared) == len(neuron_modules(model)) * (
        (2 if family in ("t5", "gpt2", "bert", "phi3") else 3) + (0 if latent is None else 2)
    )

    def gradients(probability: float) -> dict[str, Tensor | None]:
        model.zero_grad()
        with GradientMask(model, probability).step(0):
            model(**batch(family)).logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    free, masked = gradients(0.0), gradients(1.0)
    for name, parameter in model.named_parameters():
        if id(parameter) in shared:
            assert masked[name] is None, name
            assert free[name] is not None, name
            assert parameter.requires_grad
        elif free[name] is not None:
            assert torch.allclose(masked[name], free[name], rtol=1e-4, atol=1e-6), name
    assert core_grad_norms(model).keys() == {"grad_norm_auxiliary"}


@both
def test_what_freezes(latent: int | None) -> None:
    model = convert_to_mpoe(dense("llama"), config(latent=latent))
    kinds = parameter_kind(model)
    model.freeze_central()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, kind in kinds.items() if kind == "central"}
    assert len(frozen) == (3 if latent is None else 5)
    with pytest.raises(ValueError, match="is frozen or quantised"):
        GradientMask(model, 0.5)
    model.unfreeze_central()
    model.freeze_experts()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)
    model.freeze_router()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".router." in name)
    freeze_all_but_experts(model)  # an adapter: routers, neurons, P and Q
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in kinds if ".experts." in name or ".router." in name}


@pytest.mark.parametrize("family", ["t5_gated", "bert", "llama"])
@both
def test_one_graph_and_export(family: str, latent: int | None) -> None:
    layer = next(iter(neuron_modules(stirred(convert_to_mpoe(dense(family), config(latent=latent)))).values()))
    x = torch.randn(2, 5, 16)
    inputs = (torch.randn(2, 5, 24), x) if family == "bert" else (x,)
    want = layer(*inputs)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got, want, atol=1e-6)
    got.sum().backward()
    assert bool(layer.experts.down.grad.any())
    exported = torch.export.export(layer, inputs, strict=False)
    assert torch.allclose(exported.module()(*inputs), want, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_lora_on_the_projections_through_plain_peft(family: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_fc"], "llama": ["up_proj", "gate_proj", "down_proj"], "bert": ["output.dense"]}[family]
    model = stirred(convert_to_mpoe(dense(family), config()))
    want = logits(model, family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2"))
    assert torch.allclose(logits(adapted, family), want)  # LoRA starts at 0
    adapted(**batch(family)).logits.sum().backward()
    found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(found) >= len(targets)
    assert all(grad is not None and bool(grad.any()) for grad in found)


def test_projections_quantised_by_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = stirred(convert_to_mpoe(dense("llama"), config()))
    want = logits(model, "llama")
    targets = ("up_proj", "gate_proj", "down_proj")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith(targets))
    (layer,) = neuron_modules(model).values()
    assert all(type(module.weight).__module__.startswith("torchao") for module in layer.projections().values())
    assert 0 < float((logits(model, "llama") - want).abs().max() / want.abs().max()) < 0.01
    model(**batch("llama")).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())


@every_family
@both
def test_reports(family: str, latent: int | None, capsys: pytest.CaptureFixture) -> None:
    model = convert_to_mpoe(dense(family), config(latent=latent))
    layers = neuron_modules(model)
    report, untouched = model.parameter_report(), dense(family)
    assert report["dense_total"] == sum(p.numel() for p in untouched.parameters())
    shared = 0 if latent is None else len(layers) * 2 * 16 * latent
    assert report["total"] == report["dense_total"] + report["auxiliary"] + report["router"] + shared
    matrices = 3 if family in ("t5_gated", "llama", "phi3") else 2
    biases = 8 if family in ("gpt2", "bert") else 0
    assert report["auxiliary"] == len(layers) * 4 * (matrices * 8 * (latent or 16) + biases)
    rows = summarize(model, 64, 2)
    assert [row.name for row in rows] == list(layers)
    assert len(rows[0].cells()) == len(HEADER)
    f = next(iter(layers.values())).hidden_features
    ratio = 1 + 2 * 8 / f if latent is None else 1 + 2 * 6 / (matrices * f) + 2 * 6 * 8 / (16 * f)
    assert rows[0].cells()[-2:] == ("neurons", f"{ratio:.2f}")
    model.mpoe_summary()
    assert "8 neurons" in capsys.readouterr().out
    assert f"neurons=8, latent={latent}" in model_card(model)
    growth = parameter_growth(model, (4, 8))
    assert growth.mpoe[0] == report["total"]
    assert growth.dense == report["dense_total"]
    assert growth.switch[0] == report["switch_total"]
    assert growth.mpoe[1] - growth.mpoe[0] == report["auxiliary"] + report["router"]
    assert [name for name, _ in routed_layers(model)] == list(layers)
    model.cache_experts(1 << 20)  # nothing is rebuilt, and it is no error


def test_generation() -> None:
    model = stirred(convert_to_mpoe(dense("llama"), config()))
    prompt = torch.randint(1, 40, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    alone = model.generate(prompt[:1, 2:], **options)
    both_rows = model.generate(prompt, attention_mask=mask, **options)
    assert both_rows[0, 5:].tolist() == alone[0, 3:].tolist()
    slow = model.generate(prompt[:1, 2:], use_cache=False, **options)
    assert torch.equal(slow, alone)


def test_rates() -> None:
    """A neuron has the scale of a dense one, and by default its rate, from scratch and fine-tuned."""
    model = convert_to_mpoe(dense("gpt2"), config(latent=6))

    def groups(**options) -> dict[str, dict]:
        arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1.0, report_to=[], **options)
        return {group["kind"]: group for group in build_param_groups(model, arguments)}

    for regime in ("finetune", "scratch"):
        found = groups(regime=regime)
        assert found["auxiliary"]["lr"] == found["central"]["lr"] == 1.0
    asked = groups(auxiliary_lr_scale=0.5, central_lr_scale=0.25)
    assert (asked["auxiliary"]["lr"], asked["central"]["lr"]) == (0.5, 0.25)
    report = model.parameter_report()
    assert sum(p.numel() for p in asked["auxiliary"]["params"]) == report["auxiliary"] - 4 * 8  # without biases
    assert sum(p.numel() for p in asked["central"]["params"]) == 2 * 16 * 6
