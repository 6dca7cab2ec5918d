"""A slice of the bad calls of the public names; `test_at_length.py` makes two thousand."""

from __future__ import annotations

from pathlib import Path

import pytest

from .bad_arguments import NOT_CALLED, make_paths, starts
from .bad_calls import LIFE, LIVES, callable_names, public_names, run_calls, stray
from .life_cycles import WrongNumbers, live


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


def test_wrong_numbers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "top-" in live(0)
    monkeypatch.setattr("tests.faults.life_cycles.by_eager", lambda layer, x: layer(x) + 1)
    with pytest.raises(WrongNumbers, match="top-"):
        live(0)
