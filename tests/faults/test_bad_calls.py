"""A slice of the bad calls of the public names; `test_at_length.py` makes two thousand."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from . import bad_calls
from .bad_arguments import NOT_CALLED, make_paths, starts
from .bad_calls import LIFE, LIVES, Outcome, callable_names, end, judge, public_names, run_calls, stray
from .life_cycles import WrongNumbers, live
from .processes import fork


def test_every_public_name_is_called(tmp_path: Path) -> None:
    assert set(starts(tmp_path)) | NOT_CALLED == public_names()


def test_what_is_exchanged_worked(tmp_path: Path) -> None:
    make_paths(tmp_path)
    for name, (function, make) in starts(tmp_path).items():
        # Sharding wants a process group, and these three something that only their own tests build.
        if "shard" not in name and name not in {"MPOETrainer", "import_original", "lora_on_cores"}:
            assert stray(function(**make())) is None, name


def test_a_slice(tmp_path: Path) -> None:
    names = callable_names(tmp_path)
    outcome = run_calls(len(names) + LIVES, 3, tmp_path)
    assert outcome.problems == []
    assert {*outcome.worked, *outcome.refused} == {*names, LIFE}
    assert outcome.refused.total() > outcome.worked.total() > 0


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: os.abort(), "signal 6"),
        (lambda: time.sleep(60), "hangs"),
        (lambda: end(bad_calls.INSIDE), "an error from inside"),
        (lambda: end(bad_calls.STRAY), "memory that nobody wrote"),
        (lambda: end(bad_calls.WRONG), "wrong numbers"),
        (lambda: end(9), "exit status 9"),
    ],
)
def test_problems_are_noticed(work, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bad_calls, "SECONDS", 0.5)
    outcome = Outcome()
    judge(fork(work, tmp_path / "log"), "name", 1, outcome)
    assert len(outcome.problems) == 1
    assert words in outcome.problems[0]


def test_wrong_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "top-" in live(0)
    monkeypatch.setattr("tests.faults.life_cycles.by_eager", lambda layer, x: layer(x) + 1)
    with pytest.raises(WrongNumbers, match="top-"):
        live(0)


def test_memory_that_nobody_wrote_is_noticed() -> None:
    assert stray([torch.ones(2), {"a": torch.tensor([1.0, float("nan")])}])
    assert stray((torch.tensor([3, 2**31 - 1], dtype=torch.int32),))
    assert stray([torch.ones(2), torch.tensor([3]), 4, None]) is None
