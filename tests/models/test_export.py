"""A mixture as a stock Transformers class: exact, opened without mpoe, and refused if it would not be exact."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mpoe import MPOEConfig, RouterConfig, convert_to_mpoe, load_mpoe, merge_experts
from mpoe.cli import export as command
from mpoe.models.export import check_export

from .tiny_families import tiny_model

IDS = torch.randint(2, 60, (3, 17), generator=torch.Generator().manual_seed(3))
NAMES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@torch.no_grad()
def mixture(model_type="llama", **config):
    """A mixture whose experts and routers differ."""
    torch.manual_seed(4)
    config = {"num_experts": 4, "shape": "separable", "router": RouterConfig(top_k=2), **config}
    model = convert_to_mpoe(tiny_model(model_type, NAMES[model_type]), MPOEConfig(**config)).eval()
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.normal_()
        elif ".experts." in name and "central" not in name:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def difference(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize(
    ("model_type", "to", "options"),
    [
        ("llama", "mixtral", {}),
        ("llama", "mixtral", {"router": RouterConfig(top_k=1)}),
        ("llama", "mixtral", {"expert_type": "dense"}),
        ("llama", "mixtral", {"shape": "hidden"}),
        ("mistral", "mixtral", {"shape": "paper"}),
        ("qwen3", "qwen3_moe", {}),
        ("qwen3", "qwen3_moe", {"router": RouterConfig(top_k=2, is_scale_prob=True)}),
    ],
)
@torch.no_grad()
def test_the_stock_class_computes_the_same(model_type, to, options):
    model = mixture(model_type, **options)
    stock = merge_experts(model, as_=to)
    assert type(stock).__module__.startswith("transformers.")
    assert difference(stock(IDS).logits, model(IDS).logits) <= 1e-5
    greedy = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(stock.generate(IDS[:1], **greedy), model.generate(IDS[:1], **greedy))
    with torch.no_grad():
        stock.model.embed_tokens.weight.zero_()
    assert model.model.embed_tokens.weight.abs().sum() > 0


OPENED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([int(i) for i in sys.argv[3].split(",")])[None]
with torch.no_grad():
    logits = model(ids).logits
tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
assert not [name for name in sys.modules if name.partition(".")[0] in ("mpoe", "mpoe_kernels")]
save_file({"logits": logits, "tokens": tokens}, sys.argv[2])
print(type(model).__name__)
"""


@pytest.mark.slow
def test_the_command_writes_what_opens_without_mpoe(tmp_path, monkeypatch, capsys):
    model = mixture()
    model.save_pretrained(tmp_path / "in")
    monkeypatch.setattr("mpoe.cli.pretrained.load_tokenizer", lambda source: _Tokenizer())
    command.command([str(tmp_path / "in"), str(tmp_path / "out"), "--to", "mixtral", "--max_shard_size", "40KB"])
    assert "a MixtralForCausalLM whose logits differ by" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    ids = ",".join(map(str, IDS[0].tolist()))
    arguments = [sys.executable, "-c", OPENED, str(tmp_path / "out"), str(tmp_path / "result.safetensors"), ids]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=_without_mpoe(), check=False)
    assert done.stdout.strip() == "MixtralForCausalLM", done.stderr
    result, ours = load_file(tmp_path / "result.safetensors"), load_mpoe(tmp_path / "in")
    with torch.no_grad():
        assert difference(result["logits"], ours(IDS[:1]).logits) <= 1e-5
    assert torch.equal(result["tokens"], ours.generate(IDS[:1], max_new_tokens=8, do_sample=False))


def _without_mpoe():
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class _Tokenizer:
    def save_pretrained(self, folder):
        """Saves nothing: the tiny models have no tokenizer."""


@pytest.mark.parametrize(
    ("model_type", "to", "options", "words"),
    [
        ("llama", "gpt2_moe", {}, "as_ must be one of 'mixtral', 'qwen3_moe', 'olmoe', 'granite"),
        ("llama", "qwen3_moe", {}, "qwen3_moe is the mixture of a qwen3; this is a llama"),
        ("llama", "olmoe", {}, "only an OLMoE can become one; this is a llama"),
        ("llama", "mixtral", {"router": RouterConfig(top_k=2, is_scale_prob=True)}, "its gates sum to 1"),
        ("llama", "mixtral", {"router": RouterConfig(eval_capacity_factor=2.0)}, "no capacity"),
        ("llama", "mixtral", {"moe_type": "moe", "router": RouterConfig.gshard()}, "no second-expert policies"),
        ("llama", "mixtral", {"moe_type": "none", "router": None}, "it has a router; moe_type is 'none'"),
        ("llama", "mixtral", {"layers_to_transform": [1]}, "every layer is a mixture"),
        ("llama", "mixtral", {"target_modules": ["ffn", "attention"]}, "only the feed-forward networks may be"),
    ],
)
def test_what_would_not_be_exact_is_refused(model_type, to, options, words):
    with pytest.raises(ValueError) as caught:
        merge_experts(mixture(model_type, **options), as_=to)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "to", "changes"),
    [
        ("llama", "mixtral", {"head_dim": 12}),
        ("qwen3", "qwen3_moe", {"head_dim": 6}),
        ("mistral", "mixtral", {"sliding_window": 4}),
        ("mistral", "mixtral", {"sliding_window": None}),
    ],
    ids=str,
)
@torch.no_grad()
def test_heads_and_windows_are_the_models(model_type, to, changes):
    """Heads that are not the width's share, and windows shorter than the text."""
    config = copy.deepcopy(tiny_model(model_type, NAMES[model_type]).config)
    config.update(changes)
    torch.manual_seed(1)
    dense = getattr(transformers, NAMES[model_type])(config)
    model = convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable", router=RouterConfig(top_k=2))).eval()
    stock = merge_experts(model, as_=to).eval()
    for name, value in changes.items():
        assert getattr(stock.config, name) == value
    assert difference(stock(IDS).logits, model(IDS).logits) <= 1e-5


def test_layers_that_attend_differently_are_refused():
    model = mixture("qwen3")
    model.config.use_sliding_window = True
    with pytest.raises(ValueError, match="its layers attend alike; use_sliding_window is on"):
        merge_experts(model, as_="qwen3_moe")


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_how_far_logits_may_differ(dtype, allowed, tmp_path, monkeypatch):
    model = mixture().to(dtype)
    merge_experts(model, as_="mixtral").save_pretrained(tmp_path)
    own = model.forward
    for factor in (0.5, 2.0):
        shift = factor * allowed

        def shifted(*values, shift=shift, **named):
            found = own(*values, **named)
            found.logits = found.logits.double() * (1 + shift)
            return found

        monkeypatch.setattr(model, "forward", shifted)
        if factor < 1:
            assert check_export(model, tmp_path, "mixtral") < allowed
        else:
            with pytest.raises(ValueError, match="its logits differ by"):
                check_export(model, tmp_path, "mixtral")


def test_a_wrong_export_is_noticed(tmp_path):
    model = mixture()
    merge_experts(model, as_="mixtral").save_pretrained(tmp_path)
    assert check_export(model, tmp_path, "mixtral") <= 1e-5
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("gate.weight"))
    save_file({**tensors, name: -tensors[name]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the exported model must compute the same; its logits differ by"):
        check_export(model, tmp_path, "mixtral")


def test_the_command_refuses(tmp_path):
    from mpoe.cli.errors import CommandError

    with pytest.raises(CommandError, match="export needs two arguments"):
        command.command(["in"])
    tiny_model("llama", "LlamaForCausalLM").save_pretrained(tmp_path / "dense")
    with pytest.raises(CommandError, match=r"IN must be a mixture; .* is a dense llama"):
        command.command([str(tmp_path / "dense"), str(tmp_path / "out")])
    mixture().save_pretrained(tmp_path / "mixture")
    with pytest.raises(CommandError, match="holds a model; give --overwrite"):
        command.command([str(tmp_path / "mixture"), str(tmp_path / "dense")])
