"""What models whose experts keep the dense projections have in common: files, masks, freezing, adapters, reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, OPTConfig, OPTForCausalLM

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, save_mpoe_only
from mpoe.inspection import parameter_growth
from mpoe.models.others import model_card
from mpoe.models.report import HEADER, kept_modules, parameter_kind, routed_layers, summarize
from mpoe.models.sites import FFNSite
from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe.training.freezing import GradientMask, freeze_all_but_experts
from mpoe.training.statistics import core_grad_norms

from .kept_models import KEPT, batch, config, dense, every_family, every_kind, logits, stirred

RAW, SIGMOID = {"is_scale_prob": True}, {"scoring_func": "sigmoid", "bias_update_rate": 0.001}
# Kind, experts per token, fields of the router and of the configuration; neurons change no bit, whatever the gates.
STARTS = [
    *(
        ("hidden", top_k, {}, {"block_per_group": own, "backend": "eager"})
        for top_k, own in ((1, True), (1, False), (2, True), (4, True))
    ),
    *(
        (kind, top_k, gates, {})
        for kind, top_k, gates in (
            *(("neurons", 1, RAW), ("neurons", 2, {}), ("neurons", 4, SIGMOID), ("neurons", 2, RAW)),
            *(("latent", 4, {}), ("latent", 2, {"routed_scaling_factor": 1.0}), ("latent", 1, SIGMOID)),
        )
    ),
]


@every_family
@pytest.mark.parametrize(("kind", "top_k", "gates", "fields"), STARTS, ids=str)
def test_conversion_keeps_the_dense_model(kind: str, top_k: int, gates: dict, fields: dict, family: str) -> None:
    model = dense(family)
    converted = convert_to_mpoe(model, config(kind, top_k, gates, **fields))
    found, want = logits(converted, family), logits(model, family)
    exact = kind != "hidden" or top_k == 1
    assert torch.equal(found, want) if exact else (found - want).abs().max() <= 1e-5 * want.abs().max()
    before, after = dict(model.named_parameters()), dict(converted.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert len(kept_modules(converted)) == (2 if family.startswith("t5") else 1)


def layers_of(model: nn.Module) -> list:
    return list(kept_modules(model).values())


@every_family
@every_kind
def test_saved_and_loaded(kind: str, family: str, tmp_path: Path) -> None:
    router = {} if kind == "hidden" else {"scoring_func": "sigmoid", "bias_update_rate": 0.001}
    model = stirred(convert_to_mpoe(dense(family), config(kind, 2, router, expert_bias=True)))
    for _, layer in routed_layers(model):
        if router:
            layer.router.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = load_mpoe(tmp_path)
    assert loaded.mpoe_config == model.mpoe_config
    assert torch.equal(logits(loaded, family), logits(model, family))


@every_kind
def test_the_experts_and_routers_alone(kind: str, tmp_path: Path) -> None:
    base = dense("gpt2")
    model = stirred(convert_to_mpoe(base, config(kind)))
    save_mpoe_only(model, tmp_path, base)
    assert torch.equal(logits(load_mpoe(tmp_path, base=base), "gpt2"), logits(model, "gpt2"))


@every_family
@every_kind
def test_masked_steps_leave_what_is_shared_alone(kind: str, family: str) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(kind)))
    shared = {id(w) for layer in layers_of(model) for w in layer.central_parameters().values()}
    matrices = 2 if family in ("t5", "gpt2", "bert", "phi3") else 3
    assert len(shared) == len(layers_of(model)) * (matrices + 2 * (kind == "latent"))

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


@every_kind
def test_what_freezes(kind: str) -> None:
    model = convert_to_mpoe(dense("gpt2"), config(kind))
    kinds = parameter_kind(model)
    model.freeze_central()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, kind in kinds.items() if kind == "central"}
    assert len(frozen) == (4 if kind == "latent" else 2)
    with pytest.raises(ValueError, match=r"h.0.mlp.c_fc \(Conv1D\) is frozen or quantised"):
        GradientMask(model, 0.5)
    GradientMask(model, 0.0)
    model.unfreeze_central()
    GradientMask(model, 0.5)
    model.freeze_experts()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".experts." in name)
    model.freeze_router()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".router." in name)
    freeze_all_but_experts(model)  # an adapter: routers, experts, P and Q
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in kinds if ".experts." in name or ".router." in name}


@pytest.mark.parametrize("family", ["t5_gated", "bert", "llama"])
@every_kind
def test_one_graph_and_export(kind: str, family: str) -> None:
    layer = layers_of(stirred(convert_to_mpoe(dense(family), config(kind))))[0]
    x = torch.randn(2, 5, 16)
    inputs = (torch.randn(2, 5, 24), x) if family == "bert" and kind != "hidden" else (x,)
    want = layer(*inputs)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got, want, atol=1e-6)
    got.sum().backward()
    assert all(bool(core.grad.any()) for core in layer.experts.own_cores)
    exported = torch.export.export(layer, inputs, strict=False)
    assert torch.allclose(exported.module()(*inputs), want, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("kind", ["hidden", "neurons"])
def test_lora_on_the_projections_through_plain_peft(kind: str, family: str) -> None:
    """PEFT wraps the projections as in the dense model; whatever module is there is called."""
    peft = pytest.importorskip("peft")
    targets = {"gpt2": ["c_fc"], "llama": ["up_proj", "gate_proj", "down_proj"], "bert": ["output.dense"]}[family]
    model = stirred(convert_to_mpoe(dense(family), config(kind)))
    want = logits(model, family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2"))
    assert torch.allclose(logits(adapted, family), want)  # LoRA starts at 0
    adapted(**batch(family)).logits.sum().backward()
    found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(found) >= len(targets)
    assert all(grad is not None and bool(grad.any()) for grad in found)
    with pytest.raises(ValueError, match="is frozen or quantised"):
        GradientMask(adapted, 0.5)


@pytest.mark.parametrize(("kind", "bits"), [("hidden", 8), ("hidden", 4), ("neurons", 8)])
def test_projections_quantised_by_torchao(kind: str, bits: int) -> None:
    """Quantising `nn.Linear` needs no special support; experts and router still train."""
    quantization = pytest.importorskip("torchao.quantization")
    how: object = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        granularity = quantization.granularity.PerGroup(8)
        how = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    model = stirred(convert_to_mpoe(dense("llama"), config(kind)))
    want = logits(model, "llama")
    targets = ("up_proj", "gate_proj", "down_proj")
    quantization.quantize_(model, how, filter_fn=lambda _, name: name.endswith(targets))
    (layer,) = layers_of(model)
    assert all(type(module.weight).__module__.startswith("torchao") for module in layer.projections().values())
    error = float((logits(model, "llama") - want).abs().max() / want.abs().max())
    assert 0 < error < (0.01 if bits == 8 else 0.05)
    model(**batch("llama")).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())
    with pytest.raises(ValueError, match=r"mlp.up_proj \(Linear\) is frozen or quantised"):
        GradientMask(model, 0.5)


@every_family
@every_kind
def test_reports(kind: str, family: str, capsys: pytest.CaptureFixture) -> None:
    model = convert_to_mpoe(dense(family), config(kind))
    layers, latent = kept_modules(model), KEPT[kind].get("latent")
    report, untouched = model.parameter_report(), dense(family)
    assert report["dense_total"] == sum(p.numel() for p in untouched.parameters())
    shared = 0 if latent is None else len(layers) * 2 * 16 * latent
    assert report["total"] == report["dense_total"] + report["auxiliary"] + report["router"] + shared
    matrices = 3 if family in ("t5_gated", "llama", "phi3") else 2
    biases = 8 if family in ("gpt2", "bert") and kind != "hidden" else 0
    f = next(iter(layers.values())).hidden_features
    own = matrices * 8 * (f if kind == "hidden" else latent or 16) + biases
    assert report["auxiliary"] == len(layers) * 4 * own
    ratio = {
        "hidden": 1 + 2 * 8 / 16,
        "neurons": 1 + 2 * 8 / f,
        "latent": 1 + 2 * 6 / (matrices * f) + 2 * 6 * 8 / (16 * f),
    }[kind]
    rows = summarize(model, 64, 2)
    assert [row.name for row in rows] == list(layers)
    assert len(rows[0].cells) == len(HEADER)
    assert rows[0].cells[-2:] == (KEPT[kind]["shape"], f"{ratio:.2f}")
    model.mpoe_summary()
    assert (f" {f // 8} blocks, own" if kind == "hidden" else "8 neurons") in capsys.readouterr().out
    assert ("block_size=8" if kind == "hidden" else f"neurons=8, latent={latent}") in model_card(model)
    growth = parameter_growth(model, (4, 8))
    assert growth.mpoe[0] == report["total"]
    assert growth.dense == report["dense_total"]
    assert growth.switch[0] == report["switch_total"]
    assert growth.mpoe[1] - growth.mpoe[0] == report["auxiliary"] + report["router"]
    assert [name for name, _ in routed_layers(model)] == list(layers)


@every_kind
def test_rates(kind: str) -> None:
    """A neuron has the scale of a dense one, and by default its rate, from scratch and fine-tuned."""
    model = convert_to_mpoe(dense("gpt2"), config(kind))

    def groups(**options) -> dict[str, dict]:
        arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1.0, report_to=[], **options)
        return {group["kind"]: group for group in build_param_groups(model, arguments)}

    for regime in ("finetune", "scratch") if kind == "latent" else ():
        found = groups(regime=regime)
        assert found["auxiliary"]["lr"] == found["central"]["lr"] == 1.0
    asked = groups(auxiliary_lr_scale=0.5, central_lr_scale=0.25)
    assert asked["auxiliary"]["lr"] == 0.5
    assert {group["rate_ratio"] for group in asked.values()} == {1.0}
    biases = 0 if kind == "hidden" else 4 * 8
    report = model.parameter_report()
    assert sum(p.numel() for p in asked["auxiliary"]["params"]) == report["auxiliary"] - biases
    if kind == "latent":
        assert asked["central"]["lr"] == 0.25
        assert sum(p.numel() for p in asked["central"]["params"]) == 2 * 16 * 6


@every_kind
def test_without_a_router(kind: str) -> None:
    model = dense("llama")
    alone = convert_to_mpoe(model, MPOEConfig(**KEPT[kind], moe_type="none", backend="eager"))
    ids = batch("llama")["input_ids"]  # without padding: its rows are left out, and vectors of SiLU begin elsewhere
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, model(ids).logits)
    torch.testing.assert_close(logits(alone, "llama"), logits(model, "llama"), rtol=1e-6, atol=1e-7)
    assert all(layer.router is None and layer.num_experts == 1 for layer in layers_of(alone))


GSHARD, CAPACITY = {"router": RouterConfig.gshard()}, {"router": RouterConfig(capacity_factor=1.0)}
WRONG = {
    "divisor": ("hidden", {"block_size": 7}, ValueError, "block_size must divide the hidden size 64; got 7"),
    "size": ("hidden", {"block_size": 0}, ValueError, "block_size must be at least 1"),
    "group": ("hidden", {"block_per_group": 1}, TypeError, "block_per_group must be True or False"),
    "gshard": ("hidden", {"moe_type": "moe", **GSHARD}, ValueError, "needs moe_type 'switch' or 'none'"),
    "capacity": ("hidden", CAPACITY, ValueError, "shape 'hidden' needs router.capacity_factor None"),
    "top_k": ("hidden", {"router": RouterConfig(top_k=5)}, ValueError, "top_k must be at most num_experts = 4"),
    "neurons": ("neurons", {"neurons": 0}, ValueError, "neurons must be at least 1; got 0"),
    "type": ("neurons", {"neurons": 8.0}, TypeError, "neurons must be an integer or None"),
    "latent": ("neurons", {"latent": 0}, ValueError, "latent must be at least 1; got 0"),
    "other shape": ("hidden", {"neurons": 8}, ValueError, "neurons needs shape 'neurons'; got 'hidden'"),
    "no shape": ("hidden", {"shape": None, "latent": 4}, ValueError, "latent needs shape 'neurons'"),
    "factor": (
        "hidden",
        {"router": RouterConfig(routed_scaling_factor=2.0)},
        ValueError,
        "routed_scaling_factor needs shape 'neurons'",
    ),
    "attention": (
        "neurons",
        {"target_modules": ["ffn", "attention"], "shape_pattern": {"c_attn": "neurons"}},
        ValueError,
        "which is one matrix, the shape 'neurons'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    kind, change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        convert_to_mpoe(dense("gpt2"), MPOEConfig(**{"num_experts": 4, **KEPT[kind], **change}))


@every_kind
def test_a_projection_of_another_size_is_refused(kind: str) -> None:
    model = dense("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(20, 16, bias=False)
    with pytest.raises(ValueError, match=r"mlp.down_proj must be for a weight \[24, 16\]; got \[20, 16\]"):
        convert_to_mpoe(model, config(kind))


def test_projections_that_lie_elsewhere_are_refused() -> None:
    up = nn.Linear(16, 24)
    site = FFNSite("layer.mlp", "main", 0, {"up": up}, {"up": "layer.fc1"}, keeps="hidden")
    with pytest.raises(ValueError, match="needs its up projection inside the module"):
        site.check(config("hidden"))


@every_kind
def test_networks_that_are_no_module_are_refused(kind: str) -> None:
    opt = OPTConfig(vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2)
    opt.word_embed_proj_dim = 16
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartConfig(vocab_size=40, max_position_embeddings=16, **sizes, **heads)
    message = rf"shape '{KEPT[kind]['shape']}' needs its up projection inside the module \(shape='separable' supports"
    for model in (OPTForCausalLM(opt), BartForConditionalGeneration(bart)):
        with pytest.raises(ValueError, match=message):
            convert_to_mpoe(model, config(kind))
