"""A run keeps the constants that it plans its products with: when it is resumed, and on every process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mpoe_kernels.planner.device import forget
from transformers import TrainerCallback

import mpoe_kernels.contract.autotune as choice
from mpoe.training import checkpoints, prepare_output_dir
from mpoe_kernels.contract import machine

from .ranks import torchrun
from .tiny import make_trainer, resume_options

OURS, THEIRS = (
    machine.Constants(
        machine.Pair(rate, rate), machine.Pair(5.0, 5.0), machine.Pair(1.1, 1.1), machine.Pair(6e-8, 6e-8)
    )
    for rate in (1e10, 9e10)
)


class Seen(TrainerCallback):
    """What the steps were planned with."""

    def __init__(self) -> None:
        self.constants: list[machine.Constants | None] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.constants.append(machine.constants())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[machine.Constants]]:
    """A machine of which the last of a list is measured, in a process that has measured nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(machine.SETTING, "1")
    found = [OURS]
    monkeypatch.setattr(choice, "_measurer", lambda: lambda: found[-1])
    forget()
    yield found
    monkeypatch.undo()
    forget()


def moved_to_another_machine(here: list[machine.Constants], cache: Path) -> None:
    here.append(THEIRS)
    (cache / "mpoe" / machine.FILE).unlink()
    forget()


def train(folder: Path, steps: int, resume: bool = False) -> list[machine.Constants | None]:
    trainer = make_trainer(folder, **resume_options("t5", steps))
    seen = Seen()
    trainer.add_callback(seen)
    trainer.train(resume_from_checkpoint=resume or None)
    return seen.constants


def test_a_resumed_run_plans_as_it_began(here: list[machine.Constants], tmp_path: Path) -> None:
    assert train(tmp_path / "run", 3)[-1] == OURS
    assert checkpoints.machine_of(tmp_path / "run" / "checkpoint-3")["constants"] == machine._as_json(OURS)
    moved_to_another_machine(here, tmp_path / "cache")
    assert train(tmp_path / "run", 6, resume=True) == [OURS] * 3
    assert checkpoints.machine_of(tmp_path / "run" / "checkpoint-6")["constants"] == machine._as_json(OURS)
    assert train(tmp_path / "new", 1) == [THEIRS], "a new run plans for the machine it is on"


def test_a_checkpoint_of_before_was_planned_by_the_table(here: list[machine.Constants], tmp_path: Path) -> None:
    train(tmp_path / "run", 3)
    manifest = tmp_path / "run" / "checkpoint-3" / checkpoints.MANIFEST
    content = json.loads(manifest.read_text())
    del content["machine"]
    manifest.write_text(json.dumps(content))
    assert train(tmp_path / "run", 4, resume=True) == [None]


def test_a_run_without_a_checkpoint_goes_on_with_its_run_file(here: list[machine.Constants], tmp_path: Path) -> None:
    record = {"processor": "elsewhere", "constants": machine._as_json(THEIRS)}
    prepare_output_dir(tmp_path / "run", run_config={"seed": 1}, machine=record)
    assert train(tmp_path / "run", 1) == [THEIRS]
    (tmp_path / "run" / "run.json").write_text('{"machine": {"constants": 3}}')
    with pytest.raises(ValueError, match="given must be the record of a machine"):
        train(tmp_path / "run", 1)


@pytest.mark.slow
def test_two_processes_plan_alike(tmp_path: Path) -> None:
    answer = torchrun("ranks_plans", tmp_path)
    assert answer.returncode == 0, answer.stdout
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert found[0] == found[1]
    assert found[0]["flops"]["float32"] == 1e10, "the first one's"
