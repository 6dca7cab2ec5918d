"""The file that keeps what was chosen, whatever it holds and wherever it lies."""

import errno
import json
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

from mpoe_kernels.contract import BlockDims, autotune, kept
from mpoe_kernels.contract.autotune import choices, resolve_contraction
from mpoe_kernels.contract.ranking import Problem
from tests.cases import SMALL_SHAPES, named_cases
from tests.faults.processes import fork

pytestmark = pytest.mark.usefixtures("empty_cache")
DIMS = BlockDims.of_shape(SMALL_SHAPES["light"])
PROBLEM = Problem("grouped_mpo_linear", DIMS, 2, 8, torch.float32, "cpu")


def test_two_machines_share_a_home(seconds, monkeypatch):
    chosen = []
    for machine, second in (("one", 0.001), ("other", 1.0), ("one", 9.0), ("other", 9.0)):
        monkeypatch.setattr(autotune, "processor_name", lambda name=machine: name)
        seconds["second"] = second
        autotune.forget()
        chosen.append(resolve_contraction(PROBLEM).backend)
    assert chosen == ["second", "first", "second", "first"]
    assert len(kept.read_choices()) == 2


def test_what_other_processes_wrote_stays(seconds, empty_cache):
    kept.add_choices({"theirs": "native chain"})
    resolve_contraction(PROBLEM)
    assert len(kept.read_choices()) == 2
    assert list(empty_cache.parent.iterdir()) == [empty_cache], "nothing half written is left"


def test_two_processes_write_at_once(empty_cache, tmp_path):
    """A choice may be lost, and is measured again; the file stays whole, and a link is not written
    through."""
    empty_cache.parent.mkdir()
    victim = empty_cache.with_name("victim")
    victim.write_text("mine")
    empty_cache.symlink_to(victim)

    def write(number):
        for turn in range(20):
            kept.add_choices({f"{number} {turn}": "eager"})

    children = [fork(partial(write, number), tmp_path / f"{number}.log") for number in range(2)]
    for child in children:
        assert child.wait() == 0, child.log.read_text()
    assert victim.read_text() == "mine"
    assert {"0 19", "1 19"} & kept.read_choices().keys()
    assert sorted(os.listdir(empty_cache.parent)) == ["choices.json", "victim"]


def test_the_oldest_choices_go(monkeypatch):
    monkeypatch.setattr(kept, "MOST_CHOICES", 2)
    for name in "abca":
        kept.add_choices({name: "native chain"})
    assert list(kept.read_choices()) == ["c", "a"]


@named_cases(
    "content",
    {
        "empty": "",
        "cut": "{",
        "nested": "[" * 100_000,
        "list": "[1]",
        "bytes": b"\xff\xfe",
        "large": " " * (kept.LARGEST_FILE + 1),
        "newer": json.dumps({"version": 99, "choices": {"a": "b"}}),
        "no choices": json.dumps({"version": kept.VERSION, "choices": ["a"]}),
        "no strings": json.dumps({"version": kept.VERSION, "choices": {"a": 3}}),
        "foreign": json.dumps({"machine": "of an older release", "devices": {}}),
        "NaN": json.dumps({"version": float("nan"), "choices": {"a": "b"}}),
    },
)
def test_a_damaged_or_foreign_file_is_measured_again(seconds, empty_cache, content):
    empty_cache.parent.mkdir()
    empty_cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert resolve_contraction(PROBLEM).backend == "second"
    assert kept.read_choices() == choices(), "and replaced"


@pytest.mark.parametrize("value", ["native unheard-of", "abacus chain", "", "second"])
def test_an_entry_that_cannot_run_is_measured_again(seconds, value):
    resolve_contraction(PROBLEM)
    (key,) = choices()
    kept.add_choices({key: value})
    autotune.forget()
    assert resolve_contraction(PROBLEM).backend == "second"


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "link to itself", "read-only home", "home is a file"]
)
def test_an_unwritable_place_is_no_error(seconds, empty_cache, kind, monkeypatch):
    if kind == "home is a file":
        empty_cache.parent.write_text("")
    else:
        empty_cache.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(empty_cache)
    elif kind == "folder":
        empty_cache.mkdir()
    elif kind == "link to itself":
        empty_cache.symlink_to(empty_cache)
    elif kind == "read-only home":

        def refuse(**_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(tempfile, "mkstemp", refuse)
    assert resolve_contraction(PROBLEM).backend == "second"
    seconds["second"] = 3.0
    assert resolve_contraction(PROBLEM).backend == "second", "in memory"


@pytest.mark.parametrize("home", ["relative", ""])
def test_a_home_that_is_no_place_is_passed_over(home, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/of/user")
    assert kept.choices_file() == Path("/home/of/user/.cache/mpoe/choices.json")


def test_without_a_home_and_a_user_choices_lie_in_the_temporary_folder(tmp_path, monkeypatch):
    """As in a container."""

    def nobody(number):
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert kept.choices_file() == tmp_path / "mpoe/choices.json"
