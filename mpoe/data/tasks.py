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
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.data.documentation import EMBEDDED_TASKS
from mpoe.data.mappings import lookup, read_mapping
from mpoe.data.metrics import get_metric
from mpoe.data.spec import MESSAGES, HubData, TaskSpec, is_number, read_cell
from mpoe.data.tables import (
    TEXT_SUFFIXES,
    HubTables,
    Table,
    file_format,
    find_files,
    make_task,
    read_folder,
    read_table,
)
from mpoe.data.task import Task, with_subsets, with_validation_test_split

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


# ------------------------------------------------------------- data without a description


LABEL_COLUMNS = ("label", "labels", "target", "score", "class", "similarity", "gold_label", "rating", "category")
ID_COLUMNS = frozenset(("id", "idx", "index", "guid", "uid", "pairid", "promptid", "source_id"))
MAX_CLASSES = 50
# columns of instruction data
PROMPTS, RESPONSES = ("prompt", "instruction", "input"), ("response", "completion", "output")


def load_task_from_folder(
    data_dir: str | Path,
    name: str | None = None,
    *,
    kind: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_words: Mapping[Any, str] | None = None,
    column_names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    max_source_length: int | None = None,
    max_target_length: int | None = None,
    split_validation_test: bool = False,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    data_seed: int = 0,
) -> Task:
    """Read and check every split under ``data_dir`` and make a task of them.

    Args:
        data_dir: folder with a train file and perhaps validation (valid, val, dev) and test files; without validation,
            a tenth of the training items, at most a thousand, is held out for it.
        name: name of the task (default: the folder's); every source text starts with it.
        kind: classification, regression, generation or language_modeling; default: .txt files are language modelling,
            fractions (or more than 50 different numbers) regression, up to 50 labels classification.
        text_columns, label_column: default: the label is the first column called label, target, score, ...; the texts
            are the other columns that hold text, except ids.
        label_words: word the model writes for each label (default: the label itself).
        column_names: columns of csv/tsv files that have no header line.
        metrics: default by kind.
        max_source_length, max_target_length: in tokens; default 128 and 16, of instruction data 512 and 256.
        split_validation_test: take the test items out of the validation items; a test file is then not read.
        n_train, n_val, n_test, data_seed: sizes of random subsets.

    Returns:
        the task. Regression targets are rounded to the nearest 0.2 and written with one decimal, as T5 does for STS-B.

    Raises:
        ValueError: a missing folder or file, a missing column, a malformed line, an unknown label (file and line).
    """
    files = find_files(data_dir, needs_test=not split_validation_test)
    if file_format(files["train"]) in TEXT_SUFFIXES:
        if kind not in (None, "language_modeling"):
            raise ValueError(f"kind must be language_modeling for .txt files; got {kind!r}")
        kind = "language_modeling"
    tables = {split: read_table(path, column_names or ()) for split, path in files.items()}
    lengths = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    spec = detect_spec(
        tables["train"],
        name or task_name(Path(data_dir).resolve().name),
        kind,
        text_columns,
        label_column,
        label_words,
        metrics,
        **{name: length for name, length in lengths.items() if length is not None},
    )
    task = read_folder(spec, tables, data_dir)
    if split_validation_test:
        task = with_validation_test_split(task, data_seed)
    return with_subsets(task, n_train, n_val, n_test, data_seed)


def detect_hub_task(path: str, name: str, **detection: Any) -> Task:
    """The task of the hub's data set ``path``, called ``name``, with the options of `detect_spec`.

    Raises:
        ValueError: it cannot be loaded, or has no train split, label or text column.
    """
    hub = HubData(path)
    tables = HubTables(hub, name)
    spec = detect_spec(tables["train"], name, **detection)
    return make_task(dataclasses.replace(spec, hub=hub), tables, f"hub data set {path}")


def task_name(text: str) -> str:
    """A task's name made of a folder's: all characters other than letters, digits, ``_`` and ``-`` become ``_``."""
    return re.sub(r"[^\w-]+", "_", text)


def detect_spec(
    rows: Table,
    name: str,
    kind: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_words: Mapping[Any, str] | None = None,
    metrics: Sequence[str] | None = None,
    **lengths: Any,
) -> TaskSpec:
    """How to read the rows of the train split and of the others; see `load_task_from_folder`.

    The source text is the task's name and every text column's name and value; in language modelling it is only the
    values. Columns of instruction data (`PROMPTS` and one of `RESPONSES`, or ``messages``) need no options.

    Raises:
        ValueError: no label or text column, or only one label; the message names the place of the first row.
    """
    first, where = rows[0]
    columns = list(first)
    template, answer = _instructions(columns)
    if template and kind in (None, "generation") and not (text_columns or label_column or label_words):
        lengths = {"max_source_length": 512, "max_target_length": 256, **lengths}
        return TaskSpec(name, template, answer, kind="generation", metrics=tuple(metrics or ()), **lengths)
    running = kind == "language_modeling"
    label = "" if running else label_column or next((c for c in LABEL_COLUMNS if c in columns), "")
    if not label and not running:
        raise ValueError(
            f"{where}: no label column among {', '.join(columns)}; expected one of {', '.join(LABEL_COLUMNS)}, "
            "or give label_column (--label_column NAME)"
        )
    told = {c for c in columns if isinstance(first[c], str) and not is_number(first[c])}
    texts = text_columns or [c for c in columns if c in told - {label} and c.lower() not in ID_COLUMNS]
    if not texts:
        raise ValueError(f"{where}: no text column among {', '.join(columns)}; give text_columns")
    words: Mapping[Any, str] = label_words or {}
    if not running:
        labels = {read_cell(row, label, place, f"label_column of task {name}") for row, place in rows}
        kind = kind or ("classification" if words else _kind(labels))
        if kind == "classification" and not words:
            # Every label is its own word, numbers in numeric order: the second is the positive class of F1.
            numeric = all(map(is_number, labels))
            words = {x: x for x in sorted(labels, key=(lambda x: (float(x), x)) if numeric else None)}
            if len(words) < 2:
                raise ValueError(f"{where}: classification needs at least two different labels; got {', '.join(words)}")
    return TaskSpec(
        name,
        " ".join(f"{{{c}}}" for c in texts) if running else " ".join([name, *(f"{c}: {{{c}}}" for c in texts)]),
        label,
        words if kind == "classification" else {},
        str(kind),
        tuple(metrics or ()),
        **lengths,
    )


def _instructions(columns: Sequence[str]) -> tuple[str, str]:
    """Template and column of the answer of instruction data; empty if the columns are others."""
    if MESSAGES in columns:
        return f"{{{MESSAGES}}}", MESSAGES
    prompts = [column for column in PROMPTS if column in columns]
    answer = next((column for column in RESPONSES if column in columns), "")
    return (" ".join(f"{{{column}}}" for column in prompts), answer) if answer else ("", "")


def _kind(labels: set[str]) -> str:
    if all(map(is_number, labels)) and (len(labels) > MAX_CLASSES or not all(float(x).is_integer() for x in labels)):
        return "regression"
    return "classification" if len(labels) <= MAX_CLASSES else "generation"
