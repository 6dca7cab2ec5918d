"""Experts around a 4-bit centre, on a tiny Llama: memory, gradients, what trains, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mpoe_bench.quality import four_bit
from transformers import LlamaConfig, LlamaForCausalLM

from .test_quality_fields import Letters

pytest.importorskip("torchao.prototype.quantization.int4")
ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--block_size", "8", "--groups", "32", "--steps", "2", "--batch", "2", "--held_out", "2", "--rate", "0.01"]


@pytest.fixture
def arguments(tmp_path: Path):
    (tmp_path / "austen").mkdir()
    for split in ("train", "validation", "test"):
        text = "\n\n".join(f"Paragraph {i} of {split} goes on for a while." for i in range(60))
        (tmp_path / "austen" / f"{split}.txt").write_text(text)
    return four_bit.parse(["--data_dir", str(tmp_path), "--out", str(tmp_path / "results.json"), *FLAGS])


@pytest.fixture
def dense() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, pad_token_id=0, **sizes)).to(torch.bfloat16).eval()


def test_both_arms_are_kept_with_their_numbers(
    arguments, dense: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    four_bit.run(arguments, (dense, Letters()))
    results = json.loads(arguments.out.read_text())
    wide, small = results["arms"]
    assert (wide["centre"], small["centre"]) == ("bfloat16", "4 bits, groups of 32")
    rows, columns, blocks = 64, 128, 128 * 8
    assert wide["trained"] == small["trained"] == 3 * 8 * blocks + 8 * rows
    centre = 3 * rows * columns
    assert wide["bytes"] == results["dense"]["bytes"] + 2 * 3 * 8 * blocks + 4 * 8 * rows
    assert wide["bytes"] - small["bytes"] == 2 * centre - (centre // 2 + 4 * centre // 32)
    assert all(arm["loss"] < arm["loss_before"] for arm in results["arms"])
    assert small["beside_bfloat16"] == small["loss"] - wide["loss"]
    assert capsys.readouterr().out.count("nats per token") == 3


@pytest.mark.parametrize(("file", "mark"), [("results", "four bits"), ("shared", "four bits, shared")])
def test_the_pages_show_what_was_kept(file: str, mark: str) -> None:
    folder = ROOT / "bench" / "results" / "four-bit-2026-11-27"
    shown = four_bit.table(json.loads((folder / f"{file}.json").read_text()))
    for page in (folder / "README.md", ROOT / "docs" / "evidence.md"):
        assert f"<!-- {mark} -->\n{shown}\n" in page.read_text(), page


def test_gradients_pass_a_quantised_layer(arguments, dense: LlamaForCausalLM) -> None:
    model = four_bit.mixture(dense, arguments, 0)
    four_bit.quantise_centre(model, 32)
    (_, layer), *_ = four_bit.centre(model)
    assert isinstance(layer, four_bit.FrozenLinear)
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 128, dtype=torch.bfloat16)
    layer(x).backward(grad)
    with torch.no_grad():
        weight = torch.nn.functional.linear(torch.eye(64, dtype=torch.bfloat16), layer.weight).T
    assert x.grad is not None
    torch.testing.assert_close(x.grad, grad @ weight)
    assert (weight - dense.model.layers[0].mlp.up_proj.weight).abs().max() > 0  # rounded
    torch.testing.assert_close(weight, dense.model.layers[0].mlp.up_proj.weight, atol=0.01, rtol=0)
    trained = {name.split(".mlp.")[1].split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"experts", "router"}


def test_refusals(arguments, dense: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"group must divide the columns of .*mlp.up, 64; got 128"):
        four_bit.quantise_centre(four_bit.mixture(dense, arguments, 0), 128)
    monkeypatch.setattr(four_bit.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install torchao"):
        four_bit.run(arguments, (dense, Letters()))
