"""Models whose experts keep the dense projections; embedding, head, pooler and attention in MPO
form."""

import re

import pytest
import torch
from torch import nn

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.layers import MPOLinear, TiedHead
from mpoe.models import mpo_modules
from mpoe.models.card import model_card
from mpoe.models.report import HEADER, summarize
from mpoe.models.walk import kept_modules, routed_layers
from mpoe.training import MPOETrainingArguments, build_param_groups
from mpoe.training.freezing import GradientMask
from mpoe_kernels import MPOShape
from tests.assertions import refuses
from tests.cases import pairwise

from .tiny_models import (
    KEPT,
    batch,
    config,
    every_kind,
    every_model,
    first_layer,
    kept_model,
    logits,
    relative_difference,
    stirred,
    tiny_model,
)
from .tiny_models import dense_model as dense

TABLES = {"target_modules": ["ffn", "embedding"], "shape": "separable"}


def layers_of(model):
    return list(kept_modules(model).values())


@every_model
def test_masked_steps_leave_what_is_shared_alone(kind, family):
    model = stirred(kept_model(family, kind))
    shared = {id(w) for layer in layers_of(model) for w in layer.central_parameters().values()}
    matrices = 2 if family in ("t5", "gpt2", "bert_mlm", "phi3") else 3
    assert len(shared) == len(layers_of(model)) * (matrices + 2 * (kind == "latent"))

    def gradients(probability):
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


@pytest.mark.parametrize("kind, family", pairwise(list(KEPT), ["t5_gated", "bert_mlm", "llama"]))
def test_one_graph_and_export(kind, family):
    layer = first_layer(stirred(kept_model(family, kind)))
    x = torch.randn(2, 5, 24)
    inputs = (torch.randn(2, 5, 48), x) if family == "bert_mlm" and kind != "hidden" else (x,)
    want = layer(*inputs)
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.allclose(got, want, atol=1e-6)
    got.sum().backward()
    assert all(bool(core.grad.any()) for core in layer.experts.own_cores)
    exported = torch.export.export(layer, inputs, strict=False)
    assert torch.allclose(exported.module()(*inputs), want, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert_mlm"])
@pytest.mark.parametrize("kind", ["hidden", "neurons"])
def test_lora_on_the_projections_through_plain_peft(kind, family):
    """PEFT wraps the projections as in the dense model; whatever module is there is called."""
    peft = pytest.importorskip("peft")
    targets = {
        "gpt2": ["c_fc"],
        "llama": ["up_proj", "gate_proj", "down_proj"],
        "bert_mlm": ["output.dense"],
    }[family]
    model = stirred(kept_model(family, kind))
    want = logits(model, family)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=family == "gpt2")
    )
    assert torch.allclose(logits(adapted, family), want)  # LoRA starts at 0
    adapted(**batch(family)).logits.sum().backward()
    found = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(found) >= len(targets)
    assert all(grad is not None and bool(grad.any()) for grad in found)
    refuses(ValueError, "is frozen or quantised", GradientMask, adapted, 0.5)


@pytest.mark.parametrize("kind, bits", [("hidden", 8), ("hidden", 4), ("neurons", 8)])
def test_projections_quantised_by_torchao(kind, bits):
    """Quantising `nn.Linear` needs no special support; experts and router still train."""
    quantization = pytest.importorskip("torchao.quantization")
    how = quantization.Int8WeightOnlyConfig()
    if bits == 4:
        granularity = quantization.granularity.PerGroup(8)
        how = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    model = stirred(
        convert_to_mpoe(tiny_model("llama", "LlamaForCausalLM", num_hidden_layers=1), config(kind))
    )
    want = logits(model, "llama")
    targets = ("up_proj", "gate_proj", "down_proj")
    quantization.quantize_(model, how, filter_fn=lambda _, name: name.endswith(targets))
    layer = first_layer(model)
    assert all(
        type(module.weight).__module__.startswith("torchao")
        for module in layer.projections().values()
    )
    error = float((logits(model, "llama") - want).abs().max() / want.abs().max())
    assert 0 < error < (0.01 if bits == 8 else 0.2)
    model(**batch("llama")).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.experts.parameters())
    refuses(ValueError, r"mlp.up_proj \(Linear\) is frozen or quantised", GradientMask, model, 0.5)


@every_model
def test_reports(kind, family, capsys):
    model = kept_model(family, kind)
    layers, latent = kept_modules(model), KEPT[kind].get("latent")
    report, untouched = model.parameter_report(), dense(family)
    assert report["dense_total"] == sum(p.numel() for p in untouched.parameters())
    shared = 0 if latent is None else len(layers) * 2 * 24 * latent
    assert (
        report["total"] == report["dense_total"] + report["auxiliary"] + report["router"] + shared
    )
    matrices = 3 if family in ("t5_gated", "llama", "phi3") else 2
    biases = 8 if family in ("gpt2", "bert_mlm") and kind != "hidden" else 0
    f = first_layer(model).hidden_features
    own = matrices * 8 * (f if kind == "hidden" else latent or 24) + biases
    assert report["auxiliary"] == len(layers) * 4 * own
    ratio = {
        "hidden": 1 + 2 * 8 / 24,
        "neurons": 1 + 2 * 8 / f,
        "latent": 1 + 2 * 6 / (matrices * f) + 2 * 6 * 8 / (24 * f),
    }[kind]
    rows = summarize(model, 64, 2)
    assert list(rows) == list(layers)
    cells = next(iter(rows.values()))
    assert len(cells) == len(HEADER)
    assert cells[-2:] == (KEPT[kind]["shape"], f"{ratio:.2f}")
    model.mpoe_summary()
    assert (
        f" {f // 8} blocks, own" if kind == "hidden" else "8 neurons"
    ) in capsys.readouterr().out
    assert ("block_size=8" if kind == "hidden" else f"neurons=8, latent={latent}") in model_card(
        model
    )
    assert [name for name, _ in routed_layers(model)] == list(layers)


@every_kind
def test_rates(kind):
    """A neuron has the scale of a dense one, and by default its rate, from scratch and
    fine-tuned."""
    model = kept_model("gpt2", kind)

    def groups(**options):
        arguments = MPOETrainingArguments(
            output_dir="unused", learning_rate=1.0, report_to=[], **options
        )
        return {group["kind"]: group for group in build_param_groups(model, arguments)}

    for regime in ("finetune", "scratch") if kind == "latent" else ():
        found = groups(regime=regime)
        assert found["auxiliary"]["lr"] == found["central"]["lr"] == 1.0
    asked = groups(mpo_lr=2.0, auxiliary_lr_scale=0.5, central_lr_scale=0.25)
    assert asked["auxiliary"]["lr"] == 1.0
    biases = 0 if kind == "hidden" else 2 * 4 * 8
    report = model.parameter_report()
    assert sum(p.numel() for p in asked["auxiliary"]["params"]) == report["auxiliary"] - biases
    if kind == "latent":
        assert asked["central"]["lr"] == 0.5
        assert sum(p.numel() for p in asked["central"]["params"]) == 2 * 2 * 24 * 6


def test_shapes_that_a_weight_cannot_have():
    refuses(
        ValueError,
        "block_size must divide the hidden size 96; got 7",
        kept_model,
        "gpt2",
        "hidden",
        block_size=7,
    )
    pattern = {"target_modules": ["ffn", "attention"], "shape_pattern": {"c_attn": "neurons"}}
    refuses(
        ValueError,
        "which is one matrix, the shape 'neurons'",
        kept_model,
        "gpt2",
        "neurons",
        **pattern,
    )


@every_kind
def test_a_projection_of_another_size_is_refused(kind):
    model = dense("llama")
    model.model.layers[0].mlp.down_proj = nn.Linear(20, 24, bias=False)
    refuses(
        ValueError,
        r"mlp.down_proj must be for a weight \[48, 24\]; got \[20, 24\]",
        convert_to_mpoe,
        model,
        config(kind),
    )


@every_kind
def test_networks_that_are_no_module_are_refused(kind):
    message = (
        f"shape '{KEPT[kind]['shape']}' needs its up projection inside the module "
        r"\(shape='separable' supports"
    )
    for family, name in (("opt", "OPTForCausalLM"), ("bart", "BartForConditionalGeneration")):
        refuses(ValueError, message, convert_to_mpoe, tiny_model(family, name), config(kind))


# ------------------------------------------------------------------ components


@pytest.mark.parametrize("family", ["t5", "gpt2", "llama", "bert_mlm"])
def test_tied_head_and_table_learn_together(family):
    model = convert_to_mpoe(dense(family), MPOEConfig(num_experts=2, **TABLES))
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(head, TiedHead)
    x = torch.randn(3, table.embedding_dim)
    bias = 0 if head.bias is None else head.bias
    torch.testing.assert_close(head(x), x @ table.weight.T + bias, rtol=1e-4, atol=1e-4)
    model(**batch(family)).loss.backward()
    assert all(
        core.grad is not None and core.grad.abs().sum() > 0 for core in table.cores.parameters()
    )
    names = [
        name for name, _ in model.named_parameters() if "head" in name or "decoder.cores" in name
    ]
    assert not [name for name in names if "cores" in name]


@torch.no_grad()
def test_heads_of_their_own_stay_dense(tmp_path):
    model, inputs = dense("t5"), batch("t5")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    converted = convert_to_mpoe(model, MPOEConfig(num_experts=2, **TABLES))
    assert type(converted.lm_head) is nn.Linear
    assert relative_difference(model(**inputs), converted(**inputs), inputs) <= 1e-5
    converted.save_pretrained(tmp_path)
    assert torch.equal(load_mpoe(tmp_path)(**inputs).logits, converted(**inputs).logits)


def test_tables_that_are_not_shared_are_refused():
    model = dense("t5")
    model.decoder.embed_tokens.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    refuses(
        ValueError,
        r"decoder\.embed_tokens must share the table of shared",
        convert_to_mpoe,
        model,
        MPOEConfig(target_modules=["embedding"], shape="separable"),
    )


@torch.no_grad()
def test_caps_of_each_component():
    caps = {"max_bond": 7, "attention_max_bond": 6, "embedding_max_bond": 5, "pooler_max_bond": 4}
    targets = ["ffn", "attention", "embedding", "pooler"]
    model = convert_to_mpoe(
        dense("bert"), MPOEConfig(shape="paper", target_modules=targets, **caps)
    )
    largest = {}
    for name, cores in mpo_modules(model):
        kind = next(k for k in ("pooler", "embedding", "attention", "experts") if k in name)
        largest[kind] = max(largest.get(kind, 0), *cores.shape.bond_dims)
    assert largest == {"experts": 7, "attention": 6, "embedding": 5, "pooler": 4}
    assert isinstance(model.pooler.dense, MPOLinear)


@torch.no_grad()
def test_vocabularies_are_padded_and_unknown_ids_refused():
    model = dense("gpt2")
    shape = MPOShape((4, 4, 4), (2, 4, 3), None, None, 60, 24)
    config = MPOEConfig(
        target_modules=["embedding"], shape_pattern={"wte": shape}, shape="separable"
    )
    converted = convert_to_mpoe(model, config)
    table = converted.get_input_embeddings()
    assert (table.cores.shape.padded_in, table.num_embeddings) == (64, 60)
    assert converted(input_ids=torch.tensor([[59]])).logits.shape[-1] == 60
    with pytest.raises(IndexError):
        converted(input_ids=torch.tensor([[60]]))
    refuses(TypeError, "MPOEmbedding", converted.resize_token_embeddings, 64)


@torch.no_grad()
def test_shapes_by_pattern(tmp_path):
    pattern = {
        r"h\.0\.mlp": "paper",
        "mlp": {"up": MPOShape.light(24, 96, 8), "down": MPOShape.light(96, 24, 8)},
        r"attn\.c_attn": 5,
    }
    model, inputs = dense("gpt2"), batch("gpt2")
    config = MPOEConfig(
        num_experts=2, target_modules=["ffn", "attention"], shape_pattern=pattern, shape="separable"
    )
    converted = convert_to_mpoe(model, config)
    shapes = {name: cores.shape for name, cores in mpo_modules(converted)}
    assert shapes["transformer.h.0.mlp.experts.up"] == MPOShape.paper(24, 96)
    assert shapes["transformer.h.1.mlp.experts.up"] == MPOShape.light(24, 96, 8)
    assert shapes["transformer.h.1.attn.c_attn.cores"] == MPOShape.paper(24, 72, max_bond=5)
    assert shapes["transformer.h.1.attn.c_proj.cores"].is_full
    converted.save_pretrained(tmp_path)
    again = load_mpoe(tmp_path)
    assert torch.equal(again(**inputs).logits, converted(**inputs).logits)


@pytest.mark.parametrize(
    "pattern, words",
    [
        ({r"h\.7\.mlp": "paper"}, "which is none of the"),
        ({"mlp": MPOShape.paper(24, 96)}, "a mapping with 'up' and 'down'"),
        (
            {"wte": {"up": MPOShape.paper(24, 96), "down": MPOShape.paper(96, 24)}},
            "which is one matrix",
        ),
        ({"wte": MPOShape.paper(24, 24)}, "must be for a weight [60, 24]; got one for [24, 24]"),
    ],
)
def test_patterns_that_do_not_fit(pattern, words):
    refuses(
        ValueError,
        re.escape(words),
        convert_to_mpoe,
        dense("gpt2"),
        MPOEConfig(shape_pattern=pattern, **TABLES),
    )


@torch.no_grad()
def test_llama_gates_with_biases_are_refused():
    model = dense("llama")
    for layer in model.model.layers:
        layer.mlp.gate_proj.bias = nn.Parameter(torch.ones(48))
    refuses(ValueError, r"layers\.0\.mlp\.gate_proj must have no bias", convert_to_mpoe, model)
