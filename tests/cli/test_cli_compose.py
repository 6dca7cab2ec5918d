"""`mpoe compose`: models and LoRA adapters into one mixture, an expert more, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch

from mpoe import load_mpoe
from mpoe.cli import compose as command
from mpoe.cli.errors import CommandError
from mpoe.data.embedded import load_stand_in, stand_in_path

BASE = str(stand_in_path("gpt2"))
SMALL = ["--max_texts", "4", "--max_length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three fine-tunes of the tiny GPT-2, the last one a LoRA adapter, and a text for each."""
    out = tmp_path_factory.mktemp("compose")
    base, _ = load_stand_in("gpt2")
    for number in range(2):
        model = copy.deepcopy(base)
        torch.manual_seed(number)
        for name, p in model.named_parameters():
            if ".mlp." in name:
                p.data += 0.02 * torch.randn_like(p)
        model.save_pretrained(out / f"ft{number}")
    words = ("ship sea sail wave ", "list tuple dict set ", "rain snow wind sun ")
    for number, text in enumerate(words):
        (out / f"t{number}.txt").write_text(text * 60)
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(out / "ft2")
    return out


def paths(folder, kind, numbers):
    return [str(folder / kind.format(n)) for n in numbers]


def test_two_fine_tunes_then_an_adapter_more(folder, capsys):
    texts = ["--texts", *paths(folder, "t{}.txt", (0, 1))]
    command.command([BASE, *paths(folder, "ft{}", (0, 1)), "--output_dir", str(folder / "two"), *texts, *SMALL])
    printed = capsys.readouterr().out
    assert "outside the experts" in printed
    # The folders' own names, however long the way there.
    assert "ft0" in printed
    assert "ft1" in printed
    two = load_mpoe(folder / "two")
    assert two.mpoe_config.num_experts == 2
    add = ["--add", str(folder / "two"), "--output_dir", str(folder / "three"), "--texts", str(folder / "t2.txt")]
    command.command([BASE, str(folder / "ft2"), *add, *SMALL])
    three = load_mpoe(folder / "three")
    base, _ = load_stand_in("gpt2")
    merged = command.load_fine_tune(str(folder / "ft2"), base)
    experts = three.transformer.h[0].mlp.experts.up.weight
    assert torch.equal(experts[:2], two.transformer.h[0].mlp.experts.up.weight)
    assert torch.equal(experts[2], merged.transformer.h[0].mlp.c_fc.weight)
    assert not torch.equal(experts[2], base.transformer.h[0].mlp.c_fc.weight)


def test_a_trained_router(folder):
    texts = ["--texts", *paths(folder, "t{}.txt", (0, 1)), "--output_dir", str(folder / "trained")]
    options = ["--router", "train", "--steps", "1", "--top_k", "2", *SMALL]
    command.command([BASE, *paths(folder, "ft{}", (0, 1)), *texts, *options])
    config = load_mpoe(folder / "trained").mpoe_config
    assert (config.expert_type, config.router.top_k) == ("dense", 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([BASE], "at least one expert"),
        ([BASE, BASE, "--texts", "{}/t0.txt"], "compose needs --output_dir"),
        ([BASE, BASE, "--output_dir", "{}/x", "--max_length", "1"], "max_length must be at least 2"),
        ([BASE, BASE, BASE, "--output_dir", "{}/x", "--add", "{}/two"], "add takes one fine-tune at a time; got 2"),
        ([BASE, BASE, "--output_dir", "{}/x"], "texts must name a file for each of 1 fine-tunes; got 0"),
        ([BASE, BASE, "--output_dir", "{}/x", "--texts", "{}/none"], "texts: no such file"),
        ([BASE, BASE, "--output_dir", "{}/ft0", "--texts", "{}/t0.txt"], "holds a model; give --overwrite"),
        (["t5", "t5", "--output_dir", "{}/x", "--texts", "{}/t0.txt"], "takes dense causal language models"),
        ([BASE, "{}/ft9", "--output_dir", "{}/x", "--texts", "{}/t0.txt"], "no such folder"),
        ([BASE, BASE, "--output_dir", "{}/x", "--texts", "{}/bad.txt"], "must be UTF-8 text"),
        ([BASE, BASE, "--output_dir", "{}/x", "--texts", "{}/short.txt"], "must hold at least 128 tokens"),
        (
            [BASE, BASE, "--output_dir", "{}/x", "--texts", "{}/t0.txt", "--add", "{}/ft0"],
            "made by mpoe compose",
        ),
        ([BASE, "{}/odd", "--output_dir", "{}/x", "--texts", "{}/t0.txt"], "does not fit the base"),
    ],
)
def test_what_is_refused(folder, arguments, words):
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "short.txt").write_text("word")
    (folder / "odd").mkdir(exist_ok=True)
    (folder / "odd" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["nothing"], "r": 2}')
    with pytest.raises(ValueError) as caught:
        command.command([argument.replace("{}", str(folder)) for argument in arguments])
    assert words in str(caught.value)
    assert not (folder / "x" / "config.json").exists()


def test_an_adapter_without_peft(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CommandError, match="needs PEFT"):
        command.load_fine_tune(str(folder / "ft2"), None)
