"""The file of kept choices: shared by machines and processes, and no error whatever it holds."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
import torch

from mpoe_kernels.contract import BlockDims, autotune, kept
from mpoe_kernels.contract.autotune import choices, resolve_contraction
from mpoe_kernels.contract.ranking import Problem

pytestmark = pytest.mark.usefixtures("empty_cache")
DIMS = BlockDims(8, 8, 64, 12, 48, 64, 8, 8, 768, 3072)
PROBLEM = Problem("grouped_mpo_linear", DIMS, 8, 64, torch.float32, "cpu")


def test_two_machines_share_a_home(seconds: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for machine, second in (("one", 1.0), ("other", 3.0), ("one", 9.0), ("other", 9.0)):
        monkeypatch.setattr(autotune, "processor_name", lambda name=machine: name)
        seconds["second"] = second
        autotune.forget()
        found.append(resolve_contraction(PROBLEM).backend)
    assert found == ["second", "first", "second", "first"]
    assert len(kept.read_choices()) == 2


def test_what_other_processes_wrote_stays(seconds: dict[str, float], empty_cache: Path) -> None:
    kept.add_choices({"theirs": "native chain"})
    resolve_contraction(PROBLEM)
    assert len(kept.read_choices()) == 2
    assert list(empty_cache.parent.iterdir()) == [empty_cache], "nothing half written is left"


def test_the_oldest_choices_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_CHOICES", 2)
    for name in "abca":
        kept.add_choices({name: "native chain"})
    assert list(kept.read_choices()) == ["c", "a"]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "[1]",
        b"\xff\xfe",
        " " * (kept.LARGEST_FILE + 1),
        json.dumps({"version": 99, "choices": {"a": "b"}}),
        json.dumps({"version": kept.VERSION, "choices": ["a"]}),
        json.dumps({"version": kept.VERSION, "choices": {"a": 3}}),
        json.dumps({"machine": "of an older release", "devices": {}}),
    ],
    ids=["empty", "cut", "nested", "list", "bytes", "large", "newer", "no choices", "no strings", "foreign"],
)
def test_a_damaged_or_foreign_file_is_measured_again(
    seconds: dict[str, float], empty_cache: Path, content: str | bytes
) -> None:
    empty_cache.parent.mkdir()
    empty_cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert resolve_contraction(PROBLEM).backend == "second"
    assert kept.read_choices() == choices(), "and replaced"


@pytest.mark.parametrize("value", ["native unheard-of", "abacus chain", "", "second"])
def test_an_entry_that_cannot_run_is_measured_again(seconds: dict[str, float], value: str) -> None:
    resolve_contraction(PROBLEM)
    (key,) = choices()
    kept.add_choices({key: value})
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second"


@pytest.mark.parametrize("kind", ["pipe", "folder", "read-only home", "home is a file"])
def test_an_unwritable_place_is_no_error(
    seconds: dict[str, float], empty_cache: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "home is a file":
        empty_cache.parent.write_text("")
    else:
        empty_cache.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(empty_cache)
    elif kind == "folder":
        empty_cache.mkdir()
    elif kind == "read-only home":

        def refuse(**_: object) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert resolve_contraction(PROBLEM).backend == "second"
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "in memory"


@pytest.mark.parametrize(("home", "expected"), [("relative", "/home/of/user/.cache"), ("", "/home/of/user/.cache")])
def test_the_place_of_the_file(home: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/of/user")
    assert kept.choices_file() == Path(expected) / "mpoe" / "choices.json"


def test_without_a_home_and_a_user_choices_lie_in_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container."""

    def nobody(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert kept.choices_file() == tmp_path / "mpoe" / "choices.json"
