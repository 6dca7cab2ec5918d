"""Every command and example of the README runs, on small data; its two marked commands are run by CI as they stand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from mpoe.data.embedded import stand_in_path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of the README; those under a `<!-- run: ... -->` mark belong to CI."""
    found = re.findall(rf"(<!-- run: \w+ -->\n)?```{language}\n(.*?)```", README, flags=re.S)
    return [text for mark, text in found if not mark]


def test_commands(cli, sentiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sentiment.rename(tmp_path / "my_folder")
    commands = [shlex.split(line) for text in blocks("bash") for line in text.splitlines() if line.strip()]
    assert len(commands) >= 5
    ran = set()
    for program, *arguments in commands:
        assert program == "mpoe", program
        arguments = [str(stand_in_path("t5")) if a == "path/to/t5" else a for a in arguments]
        if arguments[0] == "train":
            arguments[arguments.index("--max_steps") + 1] = "2"
            arguments += ["--per_device_train_batch_size", "4", "--use_cpu"]
        if arguments[0] == "bench":
            arguments += ["--scale", "tiny"]
        answer = cli(*arguments)
        assert answer.code == 0, (arguments, answer.err)
        ran.add(arguments[0])
    assert ran >= {"train", "evaluate", "generate", "convert", "info", "plan", "bench"}


def test_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    assert '"t5-base"' in example
    exec(example.replace('"t5-base"', repr(str(stand_in_path("t5")))), {})
    assert (tmp_path / "my-mpoe-t5" / "model.safetensors").is_file()
    assert "auxiliary" in capsys.readouterr().out
