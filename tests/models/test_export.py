"""A mixture as a stock Transformers class: exact, opened without mpoe, and refused if it would not
be exact."""

import math
import os
import re
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts, merge_latent
from mpoe.cli import export as command
from mpoe.cli.errors import CommandError
from mpoe.cli.main import main
from mpoe.data.stand_in_models import load_stand_in
from mpoe.models.export import as_stock, check_export, padded_size, server_notes
from mpoe.models.walk import neuron_modules
from tests.assertions import differing, refuses, run_python
from tests.cases import in_two_dtypes

from .tiny_models import tiny_model

IDS = torch.randint(2, 60, (3, 17), generator=torch.Generator().manual_seed(3))
MIXTRAL, QWEN3, GRANITE, QWEN = "mixtral", "qwen3_moe", "granitemoeshared", "qwen2_moe"
CAUSAL = {
    "llama": "Llama",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
NAMES = {**{name: f"{own}ForCausalLM" for name, own in CAUSAL.items()}, "gpt2": "GPT2LMHeadModel"}
STOCK = {MIXTRAL: "Mixtral", QWEN3: "Qwen3Moe", GRANITE: "GraniteMoeShared", QWEN: "Qwen2Moe"}
CLASSES = {to: f"{name}ForCausalLM" for to, name in STOCK.items()}
RAW, SIGMOID = (
    RouterConfig(top_k=2, is_scale_prob=True),
    RouterConfig(top_k=2, scoring_func="sigmoid"),
)
TOP = {k: RouterConfig(top_k=k) for k in (1, 2, 3, 4)}


@torch.no_grad()
def mixture(model_type="llama", changes=None, **config):
    """A model whose experts and routers differ and matter; ``changes``: of the dense
    configuration."""
    config = {"num_experts": 4, "shape": "separable", "router": TOP[2], **config}
    changes = changes or {}
    if config["shape"] == "neurons":
        config = {"neurons": 8, **config}
        changes = {"sliding_window": None, **changes} if model_type == "mistral" else changes
    model = convert_to_mpoe(
        tiny_model(model_type, NAMES[model_type], **changes), MPOEConfig(**config)
    ).eval()
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.normal_()
        elif ".experts." in name and "central" not in name:
            parameter.add_(0.05 * torch.randn_like(parameter))
    for layer in neuron_modules(model).values():
        nn.init.normal_(layer.experts.down, std=0.4)
    return model


def neurons(model_type="llama", changes=None, **config):
    return mixture(model_type, changes, **{"shape": "neurons", **config})


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    "model_type, to, changes, options",
    [
        ("llama", MIXTRAL, {}, {}),
        ("llama", MIXTRAL, {"head_dim": 12}, {"router": TOP[1]}),
        ("llama", MIXTRAL, {}, {"expert_type": "dense"}),
        ("llama", MIXTRAL, {}, {"shape": "hidden"}),
        ("mistral", MIXTRAL, {"sliding_window": 4}, {"shape": "paper"}),
        ("mistral", MIXTRAL, {"sliding_window": None}, {}),
        ("qwen3", QWEN3, {"head_dim": 6}, {}),
        ("qwen3", QWEN3, {}, {"router": RAW}),
        ("llama", GRANITE, {}, {"shape": "neurons"}),
        (
            "llama",
            GRANITE,
            {"tie_word_embeddings": True, "head_dim": 12},
            {"shape": "neurons", "router": TOP[1]},
        ),
        (
            "llama",
            GRANITE,
            {"attention_bias": True, "hidden_act": "gelu"},
            {"shape": "neurons", "router": TOP[4]},
        ),
        ("llama", GRANITE, {}, {"shape": "neurons", "latent": 6}),
        (
            "llama",
            GRANITE,
            {},
            {"shape": "neurons", "router": RouterConfig(top_k=3, routed_scaling_factor=0.7)},
        ),
        ("mistral", GRANITE, {}, {"shape": "neurons"}),
        ("smollm3", GRANITE, {"no_rope_layers": [1, 1]}, {"shape": "neurons"}),
        ("qwen2", QWEN, {}, {"shape": "neurons"}),
        (
            "qwen2",
            QWEN,
            {"tie_word_embeddings": True},
            {"shape": "neurons", "latent": 6, "router": TOP[3]},
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_stock_class_computes_the_same(model_type, to, changes, options, tmp_path):
    """Heads that are not the width's share, and windows shorter than the text, among them."""
    model = mixture(model_type, changes, **options)
    want = model(IDS).logits
    assert difference(tiny_model(model_type, NAMES[model_type], **changes)(IDS).logits, want) > 0.01
    stock = merge_experts(model, as_=to)
    assert (type(stock).__name__, type(stock).__module__.partition(".")[0]) == (
        CLASSES[to],
        "transformers",
    )
    stock.save_pretrained(tmp_path)
    again = type(stock).from_pretrained(tmp_path)
    assert difference(again(IDS).logits, want) <= 1e-5
    assert all(
        getattr(again.config, name) == value
        for name, value in changes.items()
        if name != "no_rope_layers"
    )
    chosen, own = (m(IDS, output_router_logits=True).router_logits for m in (again, model))
    for logits, ours in zip(chosen, own, strict=True):
        k = model.mpoe_config.top_k
        assert torch.equal(logits.view(-1, 4).topk(k).indices, ours.view(-1, 4).topk(k).indices)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(IDS[:1], **greedy), model.generate(IDS[:1], **greedy))
    assert (
        again.lm_head.weight is again.model.embed_tokens.weight
    ) == model.config.tie_word_embeddings
    for parameter in stock.parameters():  # nothing is shared
        parameter.zero_()
    assert torch.equal(model(IDS).logits, want)


@in_two_dtypes
@torch.no_grad()
def test_every_number_of_neurons(dtype):
    """The stock class's default kernels take rows of certain sizes alone."""
    for count in (1, 3, 5, 8, 10, 13):
        model = neurons(neurons=count).to(dtype)
        stock = merge_experts(model, as_=GRANITE)
        assert stock.config.intermediate_size == padded_size(count), count
        assert difference(stock(IDS).logits, model(IDS).logits) <= (
            1e-5 if dtype == torch.float32 else 0.05
        ), count
    whole = mixture(changes={"intermediate_size": 46}, expert_type="dense")
    assert difference(merge_experts(whole, as_=MIXTRAL)(IDS).logits, whole(IDS).logits) <= 1e-5
    sizes = {1: 32, 32: 32, 33: 64, 59: 64, 224: 224, 228: 256, 256: 256, 257: 288, 500: 512}
    assert {count: padded_size(count) for count in sizes} == sizes


@torch.no_grad()
def test_a_family_whose_configuration_has_no_size_of_heads():
    model = neurons("smollm3", {"no_rope_layers": [1, 1]})
    want = model(IDS).logits
    del model.config.head_dim
    assert difference(merge_experts(model, as_=GRANITE)(IDS).logits, want) <= 1e-5


@torch.no_grad()
def test_latent_spaces_merge_and_dtypes_become_one():
    model = neurons(latent=6)
    one, other = merge_experts(model, as_=GRANITE), merge_experts(merge_latent(model), as_=GRANITE)
    assert not differing(one, other)
    for experts in (torch.float32, torch.bfloat16):
        half = neurons("qwen2").to(torch.bfloat16)
        for layer in neuron_modules(half).values():
            layer.experts.to(experts)
        stock = merge_experts(half, as_=QWEN)
        assert {parameter.dtype for parameter in stock.parameters()} == {torch.bfloat16}
        assert torch.isfinite(stock(IDS).logits).all()


def test_the_file_is_the_one_that_servers_read(tmp_path):
    """Names of the published checkpoints, multipliers that change nothing, and no constant of the
    gates."""
    model = neurons()
    model.generation_config.max_new_tokens = 7
    stock = merge_experts(model, as_=GRANITE)
    assert stock.generation_config.max_new_tokens == 7
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
    assert (config.embedding_multiplier, config.logits_scaling, config.residual_multiplier) == (
        1.0,
        1.0,
        1.0,
    )
    assert (
        config.intermediate_size,
        config.shared_intermediate_size,
        config.num_local_experts,
    ) == (32, 48, 4)
    layer = next(iter(neuron_modules(model).values()))
    own = stock.model.layers[0].block_sparse_moe.experts.down_proj
    assert torch.equal(own[..., :8], 2 * layer.experts.down.transpose(1, 2))  # gates times k = 2
    assert not own[..., 8:].any()


# ------------------------------------------------------------- the command

OPENED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor([int(i) for i in sys.argv[3].split(",")])[None]
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
assert not [name for name in sys.modules if name.partition(".")[0] in ("mpoe", "mpoe_kernels")]
save_file({"logits": logits, "tokens": tokens}, sys.argv[2])
assert type(model).__name__ == sys.argv[4]
"""


@pytest.mark.parametrize(
    "model_type, to, options",
    [
        ("llama", GRANITE, {"shape": "neurons", "latent": 6}),
        pytest.param("qwen2", QWEN, {"shape": "neurons"}, marks=pytest.mark.slow),
    ],
)
def test_the_command_writes_what_opens_without_mpoe(
    model_type, to, options, tmp_path, capsys, monkeypatch
):
    """The slow ones in a process of their own, the others as if there were no mpoe in this one."""
    mixture(model_type, {"vocab_size": 512}, **options).save_pretrained(tmp_path / "in")
    load_stand_in("gpt2")[1].save_pretrained(tmp_path / "in")
    command.command([str(tmp_path / "in"), str(tmp_path / "out"), "--to", to])
    answer = capsys.readouterr().out
    assert f"a {CLASSES[to]} whose logits differ by" in answer
    assert ("note: llama.cpp divides 0 by 0" in answer) == (to == QWEN)
    ids = ",".join(map(str, IDS[0].tolist()))
    arguments = (tmp_path / "out", tmp_path / "result.safetensors", ids, CLASSES[to])
    if "latent" not in options:
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        run_python("-c", OPENED, *arguments, cwd=tmp_path, env=alone)
    with monkeypatch.context() as patch:
        for name in [
            name for name in sys.modules if name.partition(".")[0] in ("mpoe", "mpoe_kernels")
        ]:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "argv", ["", *map(str, arguments)])
        exec(OPENED, {})
    result, ours = load_file(tmp_path / "result.safetensors"), load_mpoe(tmp_path / "in")
    with torch.no_grad():
        assert difference(result["logits"], ours(IDS[:1]).logits) <= 1e-5
    assert torch.equal(result["tokens"], ours.generate(IDS[:1], max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize(
    "to, words", [(GRANITE, "its experts have no biases"), (MIXTRAL, "as those of granite")]
)
def test_a_refusal_writes_nothing(to, words, tmp_path, capsys):
    neurons(expert_bias=True).save_pretrained(tmp_path / "in")
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "in"), str(tmp_path / "out"), "--to", to])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_refuses(tmp_path):
    refuses(CommandError, "export needs two arguments", command.command, ["in"])
    tiny_model("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    refuses(
        CommandError,
        r"IN must be a mixture; .* is a dense llama",
        command.command,
        [str(tmp_path / "dense"), str(tmp_path / "out")],
    )
    mixture().save_pretrained(tmp_path / "mixture")
    refuses(
        CommandError,
        "holds a model; give --overwrite",
        command.command,
        [str(tmp_path / "mixture"), str(tmp_path / "dense")],
    )


# ------------------------------------------------------------- what is not exact

PARTS = {"target_modules": ["ffn", "attention"]}
NONE = {"moe_type": "none", "router": None}
WHOLE = {"shape": "separable"}


@pytest.mark.parametrize(
    "model_type, to, changes, options, words",
    [
        ("llama", "gpt2_moe", {}, WHOLE, "as_ must be one of 'mixtral', 'qwen3_moe', 'granite"),
        ("llama", QWEN3, {}, WHOLE, "qwen3_moe is the mixture of a qwen3; this is a llama"),
        ("llama", MIXTRAL, {}, {**WHOLE, "router": RAW}, "its gates sum to 1"),
        ("llama", MIXTRAL, {}, {**WHOLE, "router": SIGMOID}, "its gates are a softmax"),
        (
            "llama",
            MIXTRAL,
            {},
            {**WHOLE, "router": RouterConfig(eval_capacity_factor=2.0)},
            "no capacity",
        ),
        (
            "llama",
            MIXTRAL,
            {},
            {**WHOLE, "moe_type": "moe", "router": RouterConfig.gshard()},
            "no second-expert",
        ),
        ("llama", MIXTRAL, {}, {**WHOLE, **NONE}, "it has a router; moe_type is 'none'"),
        ("llama", MIXTRAL, {}, {**WHOLE, "layers_to_transform": [1]}, "every layer is a mixture"),
        ("llama", MIXTRAL, {}, {**WHOLE, **PARTS}, "only the feed-forward networks may be"),
        (
            "qwen3",
            QWEN3,
            {"use_sliding_window": True},
            WHOLE,
            "its layers attend alike; use_sliding_window is on",
        ),
        ("llama", GRANITE, {}, WHOLE, "its experts are neurons beside a dense"),
        (
            "qwen2",
            GRANITE,
            {},
            {},
            "granitemoeshared is the mixture of a llama or mistral or smollm3; this is a qwen2",
        ),
        ("llama", QWEN, {}, {}, "qwen2_moe is the mixture of a qwen2; this is a llama"),
        (
            "qwen3",
            QWEN,
            {},
            {},
            "qwen2_moe is the mixture of a qwen2; this is a qwen3, beside which no stock class",
        ),
        ("gpt2", GRANITE, {}, {}, "this is a gpt2"),
        ("llama", MIXTRAL, {}, {}, "as those of granitemoeshared or qwen2_moe are"),
        (
            "llama",
            GRANITE,
            {},
            {"router": RouterConfig(top_k=2, bias_update_rate=0.001)},
            "no bias of the scores",
        ),
        ("llama", GRANITE, {}, {"expert_bias": True}, "its experts have no biases (expert_bias)"),
        ("llama", GRANITE, {"mlp_bias": True}, {}, "gate_proj must have no bias"),
        (
            "mistral",
            GRANITE,
            {"sliding_window": 4},
            {},
            "its attention has no sliding windows; sliding_window is 4",
        ),
        ("qwen2", QWEN, {"use_sliding_window": True}, {}, "its attention has no sliding windows"),
        ("smollm3", GRANITE, {"no_rope_layers": [1, 0]}, {}, "no_rope_layers leaves some without"),
    ],
)
def test_what_would_not_be_exact_is_refused(model_type, to, changes, options, words):
    # The gates' bias is refused by the conversion.
    with pytest.raises(ValueError, match=re.escape(words)):
        merge_experts(neurons(model_type, changes, **options), as_=to)


def test_projections_that_are_no_plain_linear_layers():
    peft = pytest.importorskip("peft")
    model = neurons()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    refuses(
        ValueError,
        r"projections are nn\.Linear without biases; merge adapters or dequantise",
        as_stock,
        model,
        GRANITE,
    )


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_how_far_logits_may_differ(dtype, allowed, tmp_path, monkeypatch):
    model = mixture().to(dtype)
    merge_experts(model, as_=MIXTRAL).save_pretrained(tmp_path)
    own = model.forward
    for factor in (0.5, 2.0, math.nan):

        def shifted(*values, shift=factor * allowed, **named):
            found = own(*values, **named)
            found.logits = found.logits.double() * (1 + shift)
            return found

        monkeypatch.setattr(model, "forward", shifted)
        if factor < 1:
            assert check_export(model, tmp_path, MIXTRAL) < allowed
        else:
            refuses(
                ValueError,
                "the exported model must compute the same; its logits differ by",
                check_export,
                model,
                tmp_path,
                MIXTRAL,
            )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        (
            {"head_dim": 12},
            "llama.cpp and vLLM expect heads of 6 (hidden_size / num_attention_heads) for this "
            "class",
        ),
        ({"attention_bias": True}, "vLLM's class has no biases in attention"),
        ({"hidden_act": "gelu"}, "vLLM's class computes silu; this model has gelu"),
    ],
)
def test_servers_that_compute_something_else_are_named(changes, words):
    notes = server_notes(GRANITE, merge_experts(neurons("llama", changes), as_=GRANITE).config)
    assert len(notes) == (words is not None)
    assert words is None or notes[0].startswith(words)
    assert server_notes(MIXTRAL, None) == []
