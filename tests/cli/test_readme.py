"""Every command and example of the README runs, on small data; its two marked commands are run by CI as they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_documents import run_commands, run_python

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_commands(cli, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentiment.rename(tmp_path / "my_folder")
    assert run_commands(cli, README) >= {"train", "evaluate", "generate", "convert", "info", "plan", "bench"}


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    run_python(README)
    assert (tmp_path / "my-mpoe-t5" / "model.safetensors").is_file()
    assert "auxiliary" in capsys.readouterr().out
