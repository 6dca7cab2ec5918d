"""The data of a training run, for commands that look at its model afterwards."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.tasks import DataOptions

if TYPE_CHECKING:
    from mpoe.data.spec import TaskSpec

SOURCES = {"data_dir", "tasks", "task_file", "eval_tasks"}  # options that select the items


def data_of_run(
    model_dir: str, data: DataOptions, flags: set[str]
) -> tuple[DataOptions, int, dict[str, TaskSpec] | None]:
    """Data options as in the run whose model or checkpoint is in ``model_dir``, unless a flag says otherwise.

    Returns:
        The options, the seed that split and drew the run's items (0 without a run), and the tasks that its
        ``task_file`` described at that time (None: none, or another file is given).

    Raises:
        CommandError: ``run.json`` cannot be read.
    """
    run = _settings(model_dir)
    described = None if "task_file" in flags else _descriptions(run)
    return _as_trained(data, flags, run), _seed(run), described


def _settings(model_dir: str) -> dict[str, Any]:
    """The settings of the run in ``model_dir``, or of the run whose checkpoint it is; empty without one."""
    from mpoe.training.output_dir import RUN_FILE

    for folder in (Path(model_dir), Path(model_dir).resolve().parent):
        if (folder / RUN_FILE).is_file():
            try:
                return dict(json.loads((folder / RUN_FILE).read_text())["config"])
            except (ValueError, LookupError, TypeError) as error:
                raise CommandError(f"{folder / RUN_FILE} does not describe a run: {error}") from None
    return {}


def _as_trained(data: DataOptions, flags: set[str], run: dict[str, Any]) -> DataOptions:
    """Set options without a flag as in training: lengths, columns, label words, and the items if no flag selects
    any."""
    kept = run.get("data", {})
    names = {f.name for f in fields(DataOptions) if f.name not in flags} & set(kept)
    if flags & SOURCES:
        names -= SOURCES
    taken = {name: kept[name] for name in sorted(names) if kept[name] != getattr(data, name)}
    if not taken:
        return data
    print("as in training: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    return replace(data, **taken)


def _descriptions(run: dict[str, Any]) -> dict[str, TaskSpec] | None:
    """The tasks of the run's ``task_file`` at that time; None if the run saved none."""
    from mpoe.data.spec import TaskSpec

    kept = run.get("described")
    try:
        return {name: TaskSpec.from_mapping(name, values) for name, values in kept.items()} if kept else None
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"described in run.json does not describe tasks: {error}") from None


def _seed(run: dict[str, Any]) -> int:
    """The seed that split the run's data; 0 without one.

    With another seed, split_validation_test would put items into the test split that the run used for validation.
    """
    training = run.get("training", {})
    seed = training.get("data_seed")
    return int(training.get("seed", 0) if seed is None else seed)
