"""The registry of tasks, and files that describe some: those of the package and those of the user.

A new task, read from a folder or the hub as it is described::

    register_task(TaskSpec(
        name="review",
        template="is this review good? {sentence}",
        label_words={0: "bad", 1: "good"},
        data_dir="data/review",
    ))

Or from any rows::

    register_task(Task(
        name="greeting",
        rows=lambda split: [{"text": "good morning", "label": 1}],
        to_text=lambda row: Example(f"is it a greeting: {row['text']}", "yes" if row["label"] else "no"),
        labels=("no", "yes"),
        metrics=("accuracy",),
    ))
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path

from mpoe.data.doc_tasks import EMBEDDED_TASKS
from mpoe.data.mappings import lookup, read_mapping
from mpoe.data.metrics import get_metric
from mpoe.data.spec import TaskSpec
from mpoe.data.tables import HubTables, find_files, make_task, read_folder, read_table
from mpoe.data.task import Task

STANDARD = Path(__file__).resolve().parent / "standard"


def read_task_file(path: str | os.PathLike[str]) -> dict[str, TaskSpec]:
    """Descriptions in a file, by name: a mapping of each task's name to the fields of :class:`TaskSpec`.

    A ``data_dir`` in the file is relative to the file.

    Raises:
        ValueError: no such file, malformed, no task in it, or a field that does not fit; the message names the file.
    """
    file = Path(path)
    specs = {}
    for name, values in read_mapping(file, "task file").items():
        try:
            spec = TaskSpec.from_mapping(name, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        if spec.data_dir:
            spec = dataclasses.replace(spec, data_dir=str(file.parent / spec.data_dir))
        specs[name] = spec
    if not specs:
        raise ValueError(f"{file}: expected at least one task; got none")
    return specs


@functools.cache
def standard_specs() -> dict[str, TaskSpec]:
    """The descriptions that come with the package: GLUE, SuperGLUE and others."""
    specs: dict[str, TaskSpec] = {}
    for file in sorted(STANDARD.glob("*.yaml")):
        specs.update(read_task_file(file))
    return specs


_REGISTERED: dict[str, Task | TaskSpec] = {task.name: task for task in EMBEDDED_TASKS}


def register_task(task: Task | TaskSpec, replace: bool = False) -> Task | TaskSpec:
    """Make ``task`` known by its name.

    Raises:
        ValueError: the name is taken and ``replace`` is False.
        TypeError: neither a `Task` nor a `TaskSpec`.
    """
    if not isinstance(task, Task | TaskSpec):
        raise TypeError(f"task must be a Task or a TaskSpec; got {type(task).__name__}")
    if task.name in _known() and not replace:
        raise ValueError(f"a task named {task.name!r} is registered already; pass replace=True to exchange it")
    _REGISTERED[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task called ``name``; a described one is read from its own folder or the hub.

    Raises:
        ValueError: no such task, with the close matches; or one that is nowhere but in a folder of the user's.
        RuntimeError: a metric of the task needs a package of the extra ``metrics`` that is not installed.
    """
    task = lookup(_known(), name, "task")
    return _with_packages(task) if isinstance(task, Task) else load_task(task)


def _with_packages(task: Task) -> Task:
    """The task, if what its metrics need is there: before anything is trained, not when it is scored."""
    for metric in task.metrics:
        if metric != "perplexity":
            get_metric(metric)
    return task


def find_spec(name: str) -> TaskSpec | None:
    """The description of the task called ``name``; None if there is no such task or it is more than a description."""
    task = _known().get(name)
    return task if isinstance(task, TaskSpec) else None


def load_task(spec: TaskSpec, data_dir: str | Path | None = None) -> Task:
    """The task that ``spec`` describes, from the folder ``data_dir``, its own folder, or the hub.

    Where there are no validation items they are taken out of the training items
    (:func:`mpoe.data.with_validation_from_train`).

    Raises:
        ValueError: it has no data, or what is read does not fit.
        RuntimeError: a metric of the task needs a package of the extra ``metrics`` that is not installed.
    """
    folder = data_dir or spec.data_dir
    if folder:
        files = find_files(folder, needs_test=not spec.hidden_test)
        tables = {split: read_table(path, spec.column_names, spec.skip_malformed) for split, path in files.items()}
        return _with_packages(read_folder(spec, tables, folder))
    if spec.hub_data is None:
        raise ValueError(
            f"task {spec.name} comes without data: give data_dir, a folder that holds a folder {spec.name}"
        )
    source = f"hub data set {spec.hub_data.path} of task {spec.name}"
    return _with_packages(make_task(spec, HubTables(spec.hub_data, spec.name), source))


def task_names() -> tuple[str, ...]:
    """Names of all known tasks, sorted."""
    return tuple(sorted(_known()))


def _known() -> dict[str, Task | TaskSpec]:
    return {**standard_specs(), **_REGISTERED}


def average_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks (not over metrics) of the first metric in each task's scores."""
    if not scores:
        raise ValueError("scores must hold at least one task; got none")
    return sum(next(iter(metrics.values())) for metrics in scores.values()) / len(scores)
