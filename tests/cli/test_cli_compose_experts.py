"""`mpoe compose` of experts' files: a mixture, an expert more, one fewer, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mpoe import collect_statistics, convert_to_mpoe, load_expert, load_mpoe, save_expert, start_expert
from mpoe.cli import compose as command
from mpoe.cli import train
from mpoe.cli.errors import CommandError
from mpoe.cli.main import run
from mpoe.data.embedded import load_stand_in, stand_in_path
from mpoe.models.expert_files import base_identity
from mpoe.models.expert_mixture import kept_experts
from mpoe.models.neurons import neuron_modules

BASE = str(stand_in_path("gpt2"))
SMALL = ["--max_texts", "4", "--max_length", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three experts of the tiny GPT-2, and a text of no domain."""
    out = tmp_path_factory.mktemp("experts")
    base, tokenizer = load_stand_in("gpt2")
    for number, name in enumerate(("law", "med", "code")):
        model = start_expert(base, 8 + number)
        torch.manual_seed(number)
        for layer in neuron_modules(model).values():
            torch.nn.init.normal_(layer.experts.down, std=0.02)
        ids = torch.randint(100 * number, 100 * number + 100, (4, 16))
        statistics = collect_statistics(model, [{"input_ids": ids}])
        save_expert(model, out / f"{name}.expert", statistics=statistics, tokenizer=tokenizer)
    (out / "none.txt").write_text("ship sea sail wave " * 60)
    (out / "bad").mkdir()
    return out


def compose(folder: Path, *words: str) -> None:
    command.command([BASE, *(word.format(folder) for word in words)])


def same(a: Path, b: Path) -> bool:
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_one_more_and_one_fewer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ["--background", "{}/none.txt", *SMALL]
    compose(folder, "{}/law.expert", "{}/med.expert", "--output_dir", "{}/two", *text)
    assert "law, med, none" in capsys.readouterr().out
    compose(folder, "{}/code.expert", "--add", "{}/two", "--output_dir", "{}/three")
    compose(folder, "{}/law.expert", "{}/med.expert", "{}/code.expert", "--output_dir", "{}/at_once", *text)
    assert same(folder / "three", folder / "at_once")
    compose(folder, "--add", "{}/three", "--remove", "code", "--output_dir", "{}/again")
    assert same(folder / "two", folder / "again")
    assert not same(folder / "two", folder / "three")
    three = load_mpoe(folder / "three")
    assert three.config.mpoe_experts == ["law", "med", "code", "none"]
    assert (three.mpoe_config.num_experts, three.mpoe_config.neurons, three.mpoe_config.top_k) == (4, 10, 2)
    assert [expert.name for expert in kept_experts(folder / "three")[0]] == ["law", "med", "code"]


def test_the_packaged_background(folder: Path) -> None:
    compose(folder, "{}/law.expert", "--output_dir", "{}/packaged", "--top_k", "1")
    assert json.loads((folder / "packaged" / "config.json").read_text())["mpoe"]["router"]["top_k"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}/law.expert"], "compose needs --output_dir"),
        (["{}/law.expert", "--texts", "{}/none.txt"], "texts is for fine-tunes"),
        (["{}/law.expert", "{}/absent.expert"], "absent.expert is no file"),
        (["{}/law.expert", "{}/bad"], "either fine-tunes or experts' files"),
        (["{}/law.expert", "--remove", "law"], "remove needs --add MIXTURE"),
        (["{}/law.expert", "--background", "{}/absent.txt", "--output_dir", "{}/x"], "background: no such file"),
        (["{}/law.expert", "--add", "{}/bad", "--output_dir", "{}/x"], "a mixture that was composed of experts"),
        (["{}/law.expert", "{}/law.expert", "--output_dir", "{}/x"], "'law' is there twice"),
        (["{}/bad", "--background", "{}/none.txt"], "remove and background are for experts' files"),
    ],
)
def test_refused(folder: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose(folder, *words)
    assert not (folder / "x" / "config.json").exists()


def test_names_that_are_refused(folder: Path) -> None:
    compose(folder, "{}/law.expert", "--output_dir", "{}/one", "--background", "{}/none.txt", *SMALL)
    with pytest.raises(CommandError, match="remove must name experts of the mixture, law; got med"):
        compose(folder, "--add", "{}/one", "--remove", "med", "--output_dir", "{}/x")
    with pytest.raises(CommandError, match="one is a mixture"):
        command.command([str(folder / "one"), str(folder / "law.expert"), "--output_dir", str(folder / "x")])
    base, _ = load_stand_in("gpt2")
    model = start_expert(base, 8)
    (folder / "other").mkdir()
    statistics = collect_statistics(model, [{"input_ids": torch.arange(16)[None]}])
    save_expert(model, folder / "other" / "law.expert", statistics=statistics)
    with pytest.raises(ValueError, match="must have names of their own"):
        compose(folder, "{}/law.expert", "{}/other/law.expert", "--output_dir", "{}/x")


@pytest.fixture
def novel(tmp_path: Path) -> Path:
    """A folder with running text."""
    (tmp_path / "novel").mkdir()
    for split in ("train", "validation", "test"):
        (tmp_path / "novel" / f"{split}.txt").write_text("The sea was calm, and the ship went on its way.\n" * 100)
    return tmp_path / "novel"


def test_from_texts_to_a_mixture(novel: Path, tmp_path: Path) -> None:
    flags = ["--model", "gpt2", "--data_dir", str(novel), "--max_source_length", "32", "--max_steps", "2", "--use_cpu"]
    flags += ["--learning_rate", "1e-2", "--weight_decay", "0.1", "--neurons", "16"]
    for name in ("a", "b"):
        own = ["--expert", name, "--output_dir", str(tmp_path / name), "--seed", str(ord(name))]
        assert not run(["train", *flags, *own])
    files = [str(tmp_path / name / f"{name}.expert") for name in ("a", "b")]
    expert = load_expert(files[0])
    assert (expert.facts["training"]["steps"], expert.neurons) == (2, 16)
    assert any(value.any() for name, value in expert.weights.items() if name.endswith("down"))
    assert expert.facts["base"] == base_identity(load_stand_in("gpt2")[0])
    assert not run(["compose", BASE, *files, "--output_dir", str(tmp_path / "mix")])
    assert load_mpoe(tmp_path / "mix").config.mpoe_experts == ["a", "b", "none"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--expert", "a/b"], "expert must be a name"),
        (["--expert", "a", "--num_experts", "2"], "num_experts is for mixtures"),
        (["--expert", "a", "--baseline", "dense"], "baseline is for mixtures"),
        (["--expert", "a", "--model", "{}"], "expert needs a dense language model"),
    ],
)
def test_training_that_is_refused(novel: Path, tmp_path: Path, words: list[str], message: str) -> None:
    convert_to_mpoe(load_stand_in("gpt2")[0]).save_pretrained(tmp_path / "mixture")
    words = [word.format(tmp_path / "mixture") for word in words]
    with pytest.raises(CommandError, match=message):
        train.command(["--data_dir", str(novel), "--output_dir", str(tmp_path / "run"), "--use_cpu", *words])
    assert not (tmp_path / "run").exists()
