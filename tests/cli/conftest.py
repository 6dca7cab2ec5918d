"""The command line run inside the test process, and small data folders."""

from typing import NamedTuple

import pytest

from mpoe.cli import report
from mpoe.cli.main import main

from ..models.tiny_models import shorten_documentation
from .cli_data import words, write_sentiment

FEW = {"SAMPLES": 2, "TEXT_LENGTH": 8, "CHAT_LENGTH": 8, "GENERAL_PIECES": 2}


class Unseen:
    """A figure that nobody looks at, and everything on it."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self


class Answer(NamedTuple):
    """What a run of the command line printed."""

    out: str
    err: str


@pytest.fixture
def drawn():
    """Of a test that looks at plots: they are not left out."""


@pytest.fixture(autouse=True)
def _what_takes_long_is_short(request, monkeypatch):
    """Plots, which would take as long as a short training, are painted on nothing; documentation
    is short, and so are the few samples of what a base says itself."""
    shorten_documentation(monkeypatch)
    for name, value in FEW.items():
        monkeypatch.setattr(f"mpoe.models.background.{name}", value)
    monkeypatch.setattr(
        "mpoe.models.background.domain_text", lambda name, held_out: f"Terms of {name}. " * 20
    )
    monkeypatch.setattr("mpoe.models.quiet.HELD_OUT", 2)
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr(report, "_new", lambda panels, *_: (Unseen(), [Unseen()] * panels))
        monkeypatch.setattr(report, "png", lambda figure: b"\x89PNG")


@pytest.fixture
def cli(capsys):
    """``cli("info --json")`` runs `mpoe info --json`; an exit code other than ``code`` fails the
    test."""

    def run(*lines, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words(*lines))
        out, err = capsys.readouterr()
        assert int(str(ended.value.code or 0)) == code, err
        return Answer(out, err)

    return run


@pytest.fixture
def refused(cli):
    """Run what must be refused: exit code 2, one line on stderr and no traceback; returns the
    line."""

    def run(*lines):
        answer = cli(*lines, code=2)
        lines = [line for line in answer.err.splitlines() if line.startswith("mpoe: error: ")]
        assert len(lines) == 1, answer.err
        assert "Traceback" not in answer.err
        return lines[0]

    return run


@pytest.fixture
def sentiment(tmp_path):
    """A folder with a tiny two-class task."""
    return write_sentiment(tmp_path / "sentiment")


@pytest.fixture
def prose(tmp_path):
    """A folder with a little text for language modelling."""
    folder = tmp_path / "prose"
    folder.mkdir()
    for split, size in (("train", 30), ("validation", 10), ("test", 10)):
        paragraphs = [
            f"Paragraph {i} of {split} tells that a list holds items in their order."
            for i in range(size)
        ]
        (folder / f"{split}.txt").write_text("\n\n".join(paragraphs))
    return folder
