"""Models whose experts own hidden-side blocks: bit-exact conversion, saving, merging, masking, reports, refusals."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.inspection.growth import parameter_growth
from mpoe.layers import HiddenFeedForward
from mpoe.models.card import model_card
from mpoe.models.checkpoint import save_mpoe_only
from mpoe.models.decoding import kept_while_generating
from mpoe.models.kept import hidden_modules
from mpoe.models.report import routed_layers
from mpoe.models.summary import HEADER, summarize
from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe.training.gradient_mask import GradientMask
from mpoe.training.statistics import core_grad_norms
from mpoe_kernels import reconstruct

T5 = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
LLAMA = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0}
START = {"decoder_start_token_id": 0}
MODELS = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, **START)),
    "t5_gated": lambda: T5ForConditionalGeneration(T5Config(**T5, **START, feed_forward_proj="gated-gelu")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertForMaskedLM(BertConfig(**LLAMA)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**LLAMA, num_key_value_heads=2, pad_token_id=0)),  # gate and up in one
}
every_family = pytest.mark.parametrize("family", MODELS)


def dense(family: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def config(top_k: int = 1, **fields) -> MPOEConfig:
    values = {"shape": "hidden", "block_size": 8, "num_experts": 4, **fields}
    return MPOEConfig(router=RouterConfig(top_k=top_k), **values)


def batch(family: str) -> dict[str, Tensor]:
    ids = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids} if family.startswith("t5") else {})}


def stirred(model: nn.Module) -> nn.Module:
    """The same model with random blocks and expert biases instead of the initial ones."""
    torch.manual_seed(3)
    for layer in hidden_modules(model).values():
        for parameter in layer.experts.parameters():
            nn.init.normal_(parameter, std=0.4)
    return model


def logits(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        found = model(**batch(family)).logits
    return found if family.startswith("t5") else found[batch(family)["attention_mask"].bool()]


@every_family
@pytest.mark.parametrize("per_group", [True, False])
def test_one_expert_per_token_changes_no_bit(family: str, per_group: bool) -> None:
    model = dense(family)
    converted = convert_to_mpoe(model, config(block_per_group=per_group, backend="eager"))
    assert torch.equal(logits(converted, family), logits(model, family))
    before, after = dict(model.named_parameters()), dict(converted.named_parameters())
    assert before.keys() <= after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} <= {type(m) for m in converted.modules()}


@every_family
@pytest.mark.parametrize("top_k", [2, 4])
def test_several_experts_per_token_stay_close(family: str, top_k: int) -> None:
    model = dense(family)
    want = logits(model, family)
    got = logits(convert_to_mpoe(model, config(top_k)), family)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@every_family
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(2, expert_bias=True)))
    model.save_pretrained(tmp_path)
    loaded = load_mpoe(tmp_path)
    assert loaded.mpoe_config == model.mpoe_config
    assert torch.equal(logits(loaded, family), logits(model, family))


@every_family
@pytest.mark.parametrize("per_group", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_merged_into_dense_experts(family: str, per_group: bool, own: bool, tmp_path: Path) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(2, block_per_group=per_group, expert_bias=own)))
    merged = merge_experts(model)
    want = logits(model, family)
    assert (logits(merged, family) - want).abs().max() <= 1e-5 * want.abs().max()
    assert not hidden_modules(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load_mpoe(tmp_path), family), logits(merged, family))


def test_the_experts_and_routers_alone(tmp_path: Path) -> None:
    base = dense("gpt2")
    model = stirred(convert_to_mpoe(base, config()))
    save_mpoe_only(model, tmp_path, base)
    assert torch.equal(logits(load_mpoe(tmp_path, base=base), "gpt2"), logits(model, "gpt2"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_shared_blocks_are_plain_mpos(family: str) -> None:
    """With the projections as centre, HiddenExperts' cores rebuild C1 (1 x R) and (1 x L) C2."""
    layer = next(iter(hidden_modules(stirred(convert_to_mpoe(dense(family), config(block_per_group=False)))).values()))
    features, block, settings = layer.hidden_features, 8, config(block_per_group=False)
    for kind in layer.projections():
        up = kind != "down"
        shape = settings.shape_for(kind, *((16, features) if up else (features, 16)))
        core = layer.experts.auxiliary[{"up": "right", "gate_proj": "right_gate", "down": "left"}[kind]][2, 0]
        weight = layer.projections()[kind].weight.detach()
        weight = weight if family == "gpt2" else weight.T
        centre = weight.view(1, 16, -1, block) if up else weight.view(-1, block, 16).permute(0, 2, 1)[None]
        cores = [centre, (core if up else core.T).reshape(shape.core_shapes[1])]
        assert tuple(centre.shape) == shape.core_shapes[0]
        assert torch.allclose(reconstruct(cores), layer.expert_weights(kind)[2], atol=1e-6)


@every_family
def test_masked_steps_leave_the_projections_alone(family: str) -> None:
    model = stirred(convert_to_mpoe(dense(family), config(2)))  # no dropout
    names = {id(w) for layer in hidden_modules(model).values() for w in layer.central_parameters().values()}

    def gradients(probability: float) -> dict[str, Tensor | None]:
        model.zero_grad()
        with GradientMask(model, probability).step(0):
            model(**batch(family)).logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    free, masked = gradients(0.0), gradients(1.0)
    for name, parameter in model.named_parameters():
        if id(parameter) in names:
            assert masked[name] is None, name
            assert free[name] is not None, name
            assert parameter.requires_grad
        elif free[name] is not None:
            assert torch.allclose(masked[name], free[name], rtol=1e-4, atol=1e-6), name
    assert core_grad_norms(model).keys() == {"grad_norm_auxiliary"}


def test_the_mask_compiles_into_two_graphs() -> None:
    model = convert_to_mpoe(dense("llama"), config(2)).train()
    layer, compiled = next(iter(hidden_modules(model).values())), []

    def count(graph, _):
        compiled.append(graph)
        return graph.forward

    run = torch.compile(layer, fullgraph=True, backend=count)
    x = torch.randn(2, 5, 16, requires_grad=True)
    mask = GradientMask(model, 0.5, seed=0)
    for step in range(6):
        with mask.step(step):
            run(x).sum().backward()
    assert len(compiled) <= 2


def test_one_graph_and_export() -> None:
    layer = next(iter(hidden_modules(convert_to_mpoe(dense("llama"), config(2))).values()))
    x = torch.randn(2, 5, 16)
    want = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    exported = torch.export.export(layer, (x,), strict=False)
    assert torch.allclose(exported.module()(x), want)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_lora_on_the_projections_through_plain_peft(family: str) -> None:
    """PEFT wraps the projections as in the dense model; the experts call whatever module is there."""
    peft = pytest.importorskip("peft")
    targets = ["c_fc"] if family == "gpt2" else ["up_proj", "gate_proj", "down_proj"]
    model = convert_to_mpoe(dense(family), config(2))
    want = logits(model, family)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2"))
    assert torch.allclose(logits(adapted, family), want)  # LoRA starts at 0
    adapted(**batch(family)).logits.sum().backward()
    found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(found) == len(targets)
    assert all(grad is not None and bool(grad.any()) for grad in found)
    with pytest.raises(ValueError, match="is frozen or quantised"):
        GradientMask(adapted, 0.5)


@pytest.mark.parametrize("bits", [8, 4])
def test_projections_quantised_by_torchao(bits: int) -> None:
    """Quantising `nn.Linear` needs no special support; the blocks and the router still train."""
    quantization = pytest.importorskip("torchao.quantization")
    kind: object = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        granularity = quantization.granularity.PerGroup(8)
        kind = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    model = stirred(convert_to_mpoe(dense("llama"), config(2)))
    want = logits(model, "llama")
    targets = ("up_proj", "gate_proj", "down_proj")
    quantization.quantize_(model, kind, filter_fn=lambda _, name: name.endswith(targets))
    layer = next(iter(hidden_modules(model).values()))
    assert all(type(module.weight).__module__.startswith("torchao") for module in layer.projections().values())
    error = float((logits(model, "llama") - want).abs().max() / want.abs().max())
    assert 0 < error < (0.002 if bits == 8 else 0.05)
    model(**batch("llama")).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())
    with pytest.raises(ValueError, match=r"mlp.up_proj \(Linear\) is frozen or quantised"):
        GradientMask(model, 0.5)


def test_torchao_leaves_conv1d_as_it_is() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = convert_to_mpoe(dense("gpt2"), config(2))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    (layer,) = hidden_modules(model).values()
    assert {type(module.weight) for module in layer.projections().values()} == {nn.Parameter}


def test_the_mask_refuses_projections_that_do_not_train() -> None:
    model = convert_to_mpoe(dense("gpt2"), config())
    model.freeze_central()
    assert not any(
        w.requires_grad for layer in hidden_modules(model).values() for w in layer.central_parameters().values()
    )
    with pytest.raises(ValueError, match=r"h.0.mlp.c_fc \(Conv1D\) is frozen or quantised"):
        GradientMask(model, 0.5)
    GradientMask(model, 0.0)
    model.unfreeze_central()
    GradientMask(model, 0.5)


@every_family
def test_reports(family: str, capsys: pytest.CaptureFixture) -> None:
    model = convert_to_mpoe(dense(family), config(2))
    layers = hidden_modules(model)
    report, untouched = model.parameter_report(), dense(family)
    assert report["dense_total"] == sum(p.numel() for p in untouched.parameters())
    assert report["total"] == report["dense_total"] + report["auxiliary"] + report["router"]
    assert report["auxiliary"] == sum(p.numel() for layer in layers.values() for p in layer.experts.parameters())
    rows = summarize(model, 64, 2)
    assert [row.name for row in rows] == list(layers)
    assert len(rows[0].cells()) == len(HEADER)
    assert rows[0].cells()[-2:] == ("hidden", "2.00")  # 1 + 2 * 8 / 16
    model.mpoe_summary()
    assert "blocks, own" in capsys.readouterr().out
    assert "block_size=8" in model_card(model)
    growth = parameter_growth(model, (4, 8))
    assert growth.mpoe[0] == report["total"]
    assert growth.dense == report["dense_total"]
    assert growth.switch[0] == report["switch_total"]
    assert growth.mpoe[1] - growth.mpoe[0] == report["auxiliary"] + report["router"]
    assert [name for name, _ in routed_layers(model)] == list(layers)


def test_a_cache_of_experts_has_nothing_to_keep() -> None:
    model = convert_to_mpoe(dense("gpt2"), config())
    want = logits(model, "gpt2")
    model.cache_experts(1 << 20)
    assert torch.equal(logits(model, "gpt2"), want)
    with kept_while_generating(model, 1 << 20) as cache:
        assert cache is None


def test_rates_of_the_blocks() -> None:
    model = convert_to_mpoe(dense("gpt2"), config())
    arguments = MPOETrainingArguments(output_dir="unused", learning_rate=1.0, auxiliary_lr_scale=0.5, report_to=[])
    groups = {group["kind"]: group for group in build_param_groups(model, arguments)}
    assert groups["auxiliary"]["lr"] == 0.5
    assert sum(p.numel() for p in groups["auxiliary"]["params"]) == model.parameter_report()["auxiliary"]


def test_without_a_router_and_with_noise() -> None:
    model = dense("llama")
    alone = convert_to_mpoe(model, MPOEConfig(shape="hidden", moe_type="none", backend="eager"))
    ids = batch("llama")["input_ids"]  # without padding: its rows are left out, and vectors of SiLU begin elsewhere
    with torch.no_grad():
        assert torch.equal(alone(ids).logits, model(ids).logits)
    torch.testing.assert_close(logits(alone, "llama"), logits(model, "llama"), rtol=1e-6, atol=1e-7)
    noisy = convert_to_mpoe(model, config(auxiliary_noise=0.1))
    assert not torch.equal(logits(noisy, "llama"), logits(model, "llama"))


def test_default_blocks_are_the_largest_divisor_up_to_64() -> None:
    settings = MPOEConfig(shape="hidden")
    assert [settings.hidden_block(f) for f in (3072, 192, 24, 2816, 11008, 67)] == [64, 64, 24, 64, 64, 1]


WRONG = {
    "divisor": ({"block_size": 7}, ValueError, "block_size must divide the hidden size 64; got 7"),
    "size": ({"block_size": 0}, ValueError, "block_size must be at least 1"),
    "group": ({"block_per_group": 1}, TypeError, "block_per_group must be True or False"),
    "gshard": ({"moe_type": "moe", "router": RouterConfig.gshard()}, ValueError, "needs moe_type 'switch' or 'none'"),
    "capacity": ({"router": RouterConfig(capacity_factor=1.0)}, ValueError, "needs router.capacity_factor None"),
    "top_k": ({"router": RouterConfig(top_k=5)}, ValueError, "top_k must be at most num_experts = 4"),
    "attention": (
        {"target_modules": ["ffn", "attention"], "shape_pattern": {"c_attn": "hidden"}},
        ValueError,
        "which is one matrix, the shape 'hidden'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refusals(case: str) -> None:
    change, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        convert_to_mpoe(dense("gpt2"), MPOEConfig(**{"shape": "hidden", "num_experts": 4, **change}))


def test_a_projection_of_another_size_is_refused() -> None:
    model = dense("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(20, 16, bias=False)
    with pytest.raises(ValueError, match=r"mlp.down_proj must be for a weight \[24, 16\]; got \[20, 16\]"):
        convert_to_mpoe(model, config())


def test_projections_that_lie_elsewhere_are_refused() -> None:
    from mpoe.models.sites import FFNSite

    up = nn.Linear(16, 24)
    site = FFNSite("layer.mlp", "main", 0, {"up": up}, {"up": "layer.fc1"}, keeps="hidden")
    with pytest.raises(ValueError, match="needs its up projection inside the module"):
        site.check(config())


def test_a_fused_projection_is_one_centre_of_two_halves() -> None:
    converted = convert_to_mpoe(dense("phi3"), config())
    (layer,) = hidden_modules(converted).values()
    assert {kind: weight.shape for kind, weight in layer.central_parameters().items()} == {
        "up": (48, 16),
        "down": (16, 24),
    }
    both = layer.gate_up_proj.weight.T
    assert torch.equal(layer.central_weight("gate_proj"), both[:, :24])
    assert torch.equal(layer.central_weight("up"), both[:, 24:])


def test_projections_outside_a_module_are_refused() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, pad_token_id=0))
    with pytest.raises(ValueError, match=r"needs its up projection inside the module \(shape='separable' supports it"):
        convert_to_mpoe(model, config())


def test_dropout_and_padding() -> None:
    layer = next(iter(hidden_modules(convert_to_mpoe(dense("gpt2"), config())).values()))
    assert isinstance(layer, HiddenFeedForward)
    x = torch.randn(2, 3, 16)
    x[0, 1] = float("nan")
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[0, 1] = False
    y = layer(x, mask)
    assert not y[0, 1].any()
    assert bool(torch.isfinite(y).all())
    layer.expert_dropout = 0.5
    assert not torch.equal(layer.train()(x, mask), y)


def test_blocks_larger_than_matrices_are_said() -> None:
    """At small widths a block is no smaller than a matrix."""
    sizes = {"n_embd": 8, "n_inner": 64, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 20}
    small = GPT2LMHeadModel(GPT2Config(**sizes))
    with pytest.warns(
        UserWarning, match=r"experts are larger than dense ones: [\d,]+ parameters, [\d,]+ with expert_type"
    ):
        convert_to_mpoe(small, MPOEConfig(num_experts=8, block_size=64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_mpoe(small, MPOEConfig(num_experts=8, block_size=2))
