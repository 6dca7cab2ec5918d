"""What commands write is whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpoe.cli import models as files
from mpoe.models import weight_files


def save(folder: Path, text: str, *names: str) -> None:
    with files.model_folder(folder) as staging:
        for name in ("config.json", *names):
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_text(text)


def test_a_model_replaces_another_and_nothing_else(tmp_path: Path) -> None:
    save(tmp_path, "old", "model-00001-of-00002.safetensors", "model.safetensors.index.json")
    (tmp_path / "notes.txt").write_text("mine")
    save(tmp_path, "new", "model.safetensors", "sub/more.txt")
    found = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert found == ["config.json", "model.safetensors", "notes.txt", "sub/more.txt"]
    assert (tmp_path / "config.json").read_text() == "new"
    assert not files.staging_folder(tmp_path).exists()


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_moving_leaves_no_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    save(tmp_path, "old", "model.safetensors", "tokenizer.json")
    replace, done = os.replace, []

    def stop(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "new", "model.safetensors", "tokenizer.json")
    assert not (tmp_path / "config.json").exists()
    monkeypatch.undo()
    save(tmp_path, "new", "model.safetensors")
    assert (tmp_path / "config.json").read_text() == "new"


def test_convert_that_fails_while_saving_leaves_no_model(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def full(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    answer = cli("convert", "t5", tmp_path / "out", "--num_experts", 2, code=130)
    assert answer.err.splitlines()[-1] == "mpoe: interrupted"
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    cli("convert", "t5", tmp_path / "out", "--num_experts", 2)
    assert (tmp_path / "out" / "config.json").is_file()
    assert not files.staging_folder(tmp_path / "out").exists()


def test_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    weight_files.write_text(file, "old")

    def full(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(weight_files.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        weight_files.write_text(file, "new")
    assert file.read_text() == "old"
