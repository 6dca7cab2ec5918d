"""Neurons beside a dense network as a stock Transformers class: exact, opened without mpoe, refused if not exact."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts, merge_latent
from mpoe.cli import export as command
from mpoe.cli.main import main
from mpoe.data.embedded import load_stand_in
from mpoe.models.export import as_stock, server_notes
from mpoe.models.kept import neuron_modules

from .test_export import IDS, OPENED, _without_mpoe, difference
from .tiny_families import tiny_model

GRANITE, QWEN = "granitemoeshared", "qwen2_moe"
CAUSAL = {"llama": "Llama", "mistral": "Mistral", "smollm3": "SmolLM3", "qwen2": "Qwen2", "qwen3": "Qwen3"}
NAMES = {**{name: f"{own}ForCausalLM" for name, own in CAUSAL.items()}, "gpt2": "GPT2LMHeadModel"}
CLASSES = {GRANITE: "GraniteMoeSharedForCausalLM", QWEN: "Qwen2MoeForCausalLM"}


@torch.no_grad()
def mixture(model_type="llama", changes=None, **config):
    """A model whose neurons and routers matter as much as its dense networks."""
    changes = {"sliding_window": None, **(changes or {})} if model_type == "mistral" else changes or {}
    config = {"shape": "neurons", "neurons": 8, "num_experts": 4, "router": RouterConfig(top_k=2), **config}
    model = convert_to_mpoe(tiny_model(model_type, NAMES[model_type], **changes), MPOEConfig(**config)).eval()
    torch.manual_seed(4)
    for layer in neuron_modules(model).values():
        nn.init.normal_(layer.experts.down, std=0.4)
        if layer.router is not None:
            nn.init.normal_(layer.router.weight)
    return model


@pytest.mark.parametrize(
    ("model_type", "to", "changes", "options"),
    [
        ("llama", GRANITE, {}, {}),
        ("llama", GRANITE, {"tie_word_embeddings": True, "head_dim": 12}, {"router": RouterConfig(top_k=1)}),
        ("llama", GRANITE, {"attention_bias": True, "hidden_act": "gelu"}, {"router": RouterConfig(top_k=4)}),
        ("llama", GRANITE, {}, {"latent": 6}),
        ("llama", GRANITE, {}, {"router": RouterConfig(top_k=3, routed_scaling_factor=0.7)}),
        ("mistral", GRANITE, {}, {}),
        ("smollm3", GRANITE, {"no_rope_layers": [1, 1]}, {}),
        ("qwen2", QWEN, {}, {}),
        ("qwen2", QWEN, {"tie_word_embeddings": True}, {"latent": 6, "router": RouterConfig(top_k=3)}),
    ],
)
@torch.no_grad()
def test_the_stock_class_computes_the_same(model_type, to, changes, options, tmp_path):
    model = mixture(model_type, changes, **options)
    want = model(IDS).logits
    assert difference(tiny_model(model_type, NAMES[model_type], **model_changes(model))(IDS).logits, want) > 0.1
    stock = merge_experts(model, as_=to)
    assert type(stock).__name__ == CLASSES[to]
    assert type(stock).__module__.startswith("transformers.")
    stock.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert difference(again(IDS).logits, want) <= 1e-5
    chosen = again(IDS, output_router_logits=True).router_logits
    for logits, own in zip(chosen, model(IDS, output_router_logits=True).router_logits, strict=True):
        k = model.mpoe_config.top_k
        assert torch.equal(logits.view(-1, 4).topk(k).indices, own.view(-1, 4).topk(k).indices)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(IDS[:1], **greedy), model.generate(IDS[:1], **greedy))
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    for parameter in stock.parameters():  # nothing is shared
        parameter.zero_()
    assert torch.equal(model(IDS).logits, want)


def model_changes(model):
    """The configuration of ``model`` as changes of the tiny one."""
    names = ("tie_word_embeddings", "head_dim", "attention_bias", "hidden_act", "sliding_window", "no_rope_layers")
    return {name: getattr(model.config, name) for name in names if hasattr(model.config, name)}


@torch.no_grad()
def test_merged_before_or_by_the_export():
    model = mixture(latent=6)
    one, other = merge_experts(model, as_=GRANITE), merge_experts(merge_latent(model), as_=GRANITE)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize("experts", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_sixteen_bits(experts):
    """Everything gets the dense network's dtype."""
    model = mixture("qwen2").to(torch.bfloat16)
    for layer in neuron_modules(model).values():
        layer.experts.to(experts)
    stock = merge_experts(model, as_=QWEN)
    assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
    assert torch.isfinite(stock(IDS).logits).all()


def test_the_file_is_the_one_that_servers_read(tmp_path):
    """Names of the published checkpoints, multipliers that change nothing, and no constant of the gates."""
    model = mixture()
    stock = merge_experts(model, as_=GRANITE)
    stock.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    names = {name for name in saved if ".layers.1." in name and "self_attn" not in name}
    moe = ("input_linear.weight", "output_linear.weight", "router.layer.weight")
    assert {name.rpartition("layers.1.")[2] for name in names} == {
        *("input_layernorm.weight", "post_attention_layernorm.weight"),
        *("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"),
        *(f"block_sparse_moe.{name}" for name in moe),
    }
    config = stock.config
    assert config.attention_multiplier == model.config.head_dim**-0.5
    assert (config.embedding_multiplier, config.logits_scaling, config.residual_multiplier) == (1.0, 1.0, 1.0)
    assert (config.intermediate_size, config.shared_intermediate_size, config.num_local_experts) == (8, 48, 4)
    layer = next(iter(neuron_modules(model).values()))
    own = stock.model.layers[0].block_sparse_moe.experts.down_proj
    assert torch.equal(own, 2 * layer.experts.down.transpose(1, 2))  # gates times k = 2


@pytest.mark.parametrize(
    ("model_type", "to"),
    [
        ("llama", GRANITE),
        pytest.param("mistral", GRANITE, marks=pytest.mark.slow),
        pytest.param("qwen2", QWEN, marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_what_opens_without_mpoe(model_type, to, tmp_path, capsys):
    mixture(model_type, {"vocab_size": 512}, latent=6).save_pretrained(tmp_path / "in")
    _, tokenizer = load_stand_in("gpt2")
    tokenizer.save_pretrained(tmp_path / "in")
    command.command([str(tmp_path / "in"), str(tmp_path / "out"), "--to", to])
    answer = capsys.readouterr().out
    assert f"a {CLASSES[to]} whose logits differ by" in answer
    assert ("note: llama.cpp divides 0 by 0" in answer) == (to == QWEN)
    ids = ",".join(map(str, IDS[0].tolist()))
    code = OPENED.replace(
        "print(", "from transformers import AutoTokenizer as A; A.from_pretrained(sys.argv[1])\nprint("
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "out"), str(tmp_path / "result.safetensors"), ids]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=_without_mpoe(), check=False)
    assert done.stdout.strip() == CLASSES[to], done.stderr
    result, ours = load_file(tmp_path / "result.safetensors"), load_mpoe(tmp_path / "in")
    with torch.no_grad():
        assert difference(result["logits"], ours(IDS[:1]).logits) <= 1e-5
    assert torch.equal(result["tokens"], ours.generate(IDS[:1], max_new_tokens=8, do_sample=False))


SIGMOID = RouterConfig(top_k=2, scoring_func="sigmoid")


@pytest.mark.parametrize(
    ("model_type", "to", "changes", "options", "words"),
    [
        ("qwen2", GRANITE, {}, {}, "granitemoeshared is the mixture of a llama or mistral or smollm3; this is a qwen2"),
        ("llama", QWEN, {}, {}, "qwen2_moe is the mixture of a qwen2; this is a llama"),
        ("qwen3", QWEN, {}, {}, "qwen2_moe is the mixture of a qwen2; this is a qwen3, beside which no stock class"),
        ("gpt2", GRANITE, {}, {}, "this is a gpt2"),
        ("llama", "mixtral", {}, {}, "as those of granitemoeshared or qwen2_moe are"),
        ("llama", GRANITE, {}, {"shape": "separable", "neurons": None}, "its experts are neurons beside a dense"),
        ("llama", GRANITE, {}, {"router": RouterConfig(top_k=2, is_scale_prob=True)}, "its gates sum to 1"),
        ("llama", GRANITE, {}, {"router": SIGMOID}, "its gates are a softmax; scoring_func is 'sigmoid'"),
        ("llama", "mixtral", {}, {"shape": "separable", "neurons": None, "router": SIGMOID}, "its gates are a softmax"),
        ("llama", GRANITE, {}, {"router": RouterConfig(top_k=2, bias_update_rate=0.001)}, "no bias of the scores"),
        ("llama", GRANITE, {}, {"expert_bias": True}, "its experts have no biases (expert_bias)"),
        ("llama", GRANITE, {"mlp_bias": True}, {}, "gate_proj must have no bias"),
        ("llama", GRANITE, {}, {"moe_type": "none", "router": None}, "it has a router; moe_type is 'none'"),
        ("llama", GRANITE, {}, {"layers_to_transform": [1]}, "every layer is a mixture"),
        ("llama", GRANITE, {}, {"target_modules": ["ffn", "attention"]}, "only the feed-forward networks may be"),
        ("mistral", GRANITE, {"sliding_window": 4}, {}, "its attention has no sliding windows; sliding_window is 4"),
        ("qwen2", QWEN, {"use_sliding_window": True}, {}, "its attention has no sliding windows"),
        ("smollm3", GRANITE, {"no_rope_layers": [1, 0]}, {}, "no_rope_layers leaves some without"),
    ],
)
def test_what_would_not_be_exact_is_refused(model_type, to, changes, options, words):
    with pytest.raises(ValueError) as caught:
        merge_experts(mixture(model_type, changes, **options), as_=to)
    assert words in str(caught.value)


def test_projections_that_are_no_plain_linear_layers():
    peft = pytest.importorskip("peft")
    model = mixture()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(
        ValueError, match=r"its dense projections are nn\.Linear without biases; merge adapters or dequantise first"
    ):
        as_stock(model, GRANITE)


@pytest.mark.parametrize(("to", "words"), [(GRANITE, "its experts have no biases"), ("mixtral", "as those of granite")])
def test_a_refusal_writes_nothing(to, words, tmp_path, capsys):
    mixture(expert_bias=True).save_pretrained(tmp_path / "in")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"head_dim": 12}, "llama.cpp and vLLM expect heads of 6 (hidden_size / num_attention_heads) for this class"),
        ({"attention_bias": True}, "vLLM's class has no biases in attention"),
        ({"hidden_act": "gelu"}, "vLLM's class computes silu; this model has gelu"),
    ],
)
def test_servers_that_compute_something_else_are_named(changes, words):
    notes = server_notes(GRANITE, merge_experts(mixture("llama", changes), as_=GRANITE).config)
    assert len(notes) == (words is not None)
    assert words is None or notes[0].startswith(words)
    assert server_notes("mixtral", None) == []
    assert server_notes(QWEN, transformers.Qwen2MoeConfig()) == []  # one that was a Qwen2-MoE before its conversion
