"""A run plans its products with one set of constants, also after it is resumed and on all of its processes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from mpoe.training import checkpoints
from mpoe.training.output_dir import RUN_FILE
from mpoe_kernels import measure_machine
from mpoe_kernels.planner import machine


def measured_record(arguments: TrainingArguments) -> dict[str, Any] | None:
    """The constants for a new run on this CPU, measured now if necessary; None on other devices."""
    if arguments.device.type != "cpu":
        return None
    measure_machine()
    return machine.record()


def _record(arguments: TrainingArguments, checkpoint: str | None) -> dict[str, Any] | None:
    """The record of the resumed run, of ``run.json``, or of a new run on several processes."""
    found = None if checkpoint is None else checkpoints.machine_of(checkpoint)
    run_file = Path(str(arguments.output_dir)) / RUN_FILE
    if found is None and run_file.is_file():
        found = json.loads(run_file.read_text(encoding="utf-8")).get("machine")
    if found is None and arguments.world_size > 1:
        found = measured_record(arguments)
    return found


@contextmanager
def same_plans(arguments: TrainingArguments, checkpoint: str | None) -> Iterator[None]:
    """Plan with the constants that the run started with; the first process sends them to the others.

    Args:
        arguments: the run's arguments.
        checkpoint: the checkpoint that it is resumed from, if any.

    Raises:
        ValueError: the saved record is not a record of a machine.
    """
    found = [_record(arguments, checkpoint) if arguments.process_index == 0 else None]
    if arguments.world_size > 1:
        broadcast_object_list(found)
    if found[0] is None:  # a new run on one process measures at its first choice
        yield
        return
    with machine.using(found[0]):
        yield
