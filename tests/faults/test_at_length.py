"""What docs/reliability.md tells, at length: ``pytest -m exhaustive -s tests/faults``; SEED=1 tries other inputs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import bad_calls, kills, memory, races
from .test_fuzz import KINDS, quiet, tried

__all__ = ["quiet"]
SEED = int(os.environ.get("SEED", "0"))
pytestmark = [pytest.mark.exhaustive, pytest.mark.usefixtures("quiet")]


def test_fifty_killed_runs(tmp_path: Path) -> None:
    tally = kills.kill_runs(50, SEED, tmp_path)
    print(f"{tally.kills} killed, {tally.while_saving} while saving: {tally.runs} runs resumed to the same weights")
    assert tally.problems == []


def test_two_hundred_races(tmp_path: Path) -> None:
    tally = races.race(200, SEED, tmp_path)
    print(f"{tally.races} races: of {tally.processes} processes {tally.entered} were in, {tally.told} were told who is")
    assert tally.problems == []


def test_six_full_disks(tmp_path: Path) -> None:
    expected = kills.straight_run(tmp_path)
    room = (tmp_path / "straight" / "model.safetensors").stat().st_size
    for number in range(6):
        assert kills.full_disk(tmp_path, 1 + number * (2 * room - 2) // 5, expected) == []


def test_two_thousand_bad_calls(tmp_path: Path) -> None:
    outcome = bad_calls.run_calls(2000, SEED, tmp_path)
    print(f"{outcome.refused.total()} refused clearly, {outcome.worked.total()} worked")
    assert outcome.problems == []


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_inputs(kind: str, tmp_path: Path) -> None:
    print(f"{kind}: {dict(tried(kind, 500, SEED, tmp_path))}")


def test_a_thousand_steps() -> None:
    grown = memory.growth(steps=1000, warm=200)
    print(f"{grown.bytes_per_step:+.0f} bytes per step, {grown.new_tensors:+d} tensors")
    assert grown.bytes_per_step < 2_000
    assert grown.new_tensors <= 0
