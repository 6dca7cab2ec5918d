"""The registry of tasks, and files that describe some: those of the package and those of the user.

A task is registered as a `TaskSpec`, which says how its rows in a folder or on the hub are read, or
as a `Task` with rows from anywhere.
"""

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.config.checks import check_choice, check_type, refusing
from mpoe.data.embedded_tasks import EMBEDDED_TASKS
from mpoe.data.mappings import read_mapping
from mpoe.data.spec import MESSAGES, HubData, TaskSpec, read_cell
from mpoe.data.tables import TEXT_COLUMN, Table, folder_tables, hub_tables, make_task
from mpoe.data.task import Task, is_number, with_packages

STANDARD = Path(__file__).resolve().parent / "standard"


def read_task_file(path: str | os.PathLike[str]) -> dict[str, TaskSpec]:
    """Descriptions in a file, by name: a mapping of each task's name to the fields of
    :class:`TaskSpec`.

    A ``data_dir`` in the file is relative to the file.

    Raises:
        ValueError: no such file, malformed, no task in it, or a field that does not fit; the
            message names the file.
    """
    file = Path(path)
    specs = {}
    for name, values in read_mapping(file, "task file").items():
        with refusing(f"{file}: ", (TypeError, ValueError)):
            spec = TaskSpec.from_mapping(name, values)
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
        specs |= read_task_file(file)
    return specs


_REGISTERED: dict[str, Task | TaskSpec] = {task.name: task for task in EMBEDDED_TASKS}


def _known() -> dict[str, Task | TaskSpec]:
    return {**standard_specs(), **_REGISTERED}


def register_task(task: Task | TaskSpec, replace: bool = False) -> Task | TaskSpec:
    """Make ``task`` known by its name.

    Raises:
        ValueError: the name is taken and ``replace`` is False.
        TypeError: neither a `Task` nor a `TaskSpec`.
    """
    check_type("task", task, Task | TaskSpec, "a Task or a TaskSpec")
    if task.name in _known() and not replace:
        raise ValueError(
            f"a task named {task.name!r} is registered already; pass replace=True to exchange it"
        )
    _REGISTERED[task.name] = task
    return task


def task_names() -> tuple[str, ...]:
    """Names of all known tasks, sorted."""
    return tuple(sorted(_known()))


def find_spec(name: str) -> TaskSpec | None:
    """The description of the task called ``name``; None if there is no such task or it is more than
    a description."""
    task = _known().get(name)
    return task if isinstance(task, TaskSpec) else None


def get_task(name: str) -> Task:
    """The task called ``name``; a described one is read from its own folder or the hub.

    Raises:
        ValueError: no such task, with the close matches; or one that is nowhere but in a folder of
            the user's.
        RuntimeError: a metric of the task needs a package of the extra ``metrics`` that is not
            installed.
    """
    known = _known()
    check_choice("task", name, list(known))
    task = known[name]
    return with_packages(task) if isinstance(task, Task) else load_task(task)


def load_task(spec: TaskSpec, data_dir: str | Path | None = None) -> Task:
    """The task that ``spec`` describes, from the folder ``data_dir``, its own folder, or the hub.

    A split is read and checked when it is first asked for; a data set on the hub is fetched at
    once. Where there are no validation items they are taken out of the training items: a tenth, at
    most a thousand.

    Raises:
        ValueError: it has no data, the hub does not give it, or (on reading) what is read does not
            fit.
        RuntimeError: a metric of the task needs a package of the extra ``metrics`` that is not
            installed.
    """
    folder = data_dir or spec.data_dir
    if folder:
        tables = folder_tables(folder, spec.column_names, spec.skip_malformed)
        source = f"data_dir {folder}"
    elif spec.hub is None:
        raise ValueError(
            f"task {spec.name} comes without data: give data_dir, a folder that holds a folder "
            f"{spec.name}"
        )
    else:
        tables = hub_tables(spec.hub, spec.name)
        source = f"hub data set {spec.hub.path} of task {spec.name}"
    return make_task(spec, tables, source)


# ------------------------------------------------------------- data without a description


LABEL_COLUMNS = (
    "label",
    "labels",
    "target",
    "score",
    "class",
    "similarity",
    "gold_label",
    "rating",
    "category",
)
ID_COLUMNS = frozenset(("id", "idx", "index", "guid", "uid", "pairid", "promptid", "source_id"))
MAX_CLASSES = 50
# columns of instruction data
PROMPTS = ("prompt", "instruction", "input")
RESPONSES = ("response", "completion", "output")


def load_task_from_folder(
    data_dir: str | Path,
    name: str | None = None,
    *,
    column_names: Sequence[str] = (),
    **detection: Any,
) -> Task:
    """The task of the files in a folder, whose columns are detected.

    Args:
        data_dir: folder with a train file and perhaps validation (valid, val, dev) and test files,
            or a data set on the hub: a text ``owner/name`` where there is no folder ``owner`` (a
            ``Path`` is always a folder); without validation, a tenth of the training items, at most
            a thousand, is held out.
        name: name of the task (default: the folder's); source texts of labelled items start with
            it.
        column_names: columns of csv/tsv files that have no header line.
        detection: options of `detect_spec`.

    Raises:
        ValueError: a missing folder or file; a missing column, a malformed line, an unknown label
            (file and line), of splits other than train when they are first read.
    """
    name = name or task_name(Path(data_dir).resolve().name)
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(data_dir))
    if isinstance(data_dir, str) and is_hub_name and not Path(data_dir).parent.exists():
        tables = hub_tables(HubData(data_dir), name)
        source = f"hub data set {data_dir}"
    else:
        tables = folder_tables(data_dir, column_names)
        source = f"data_dir {data_dir}"
    rows = tables["train"]()
    spec = detect_spec(rows, name, **detection)
    task = make_task(spec, {**tables, "train": lambda: rows}, source)
    task.train()
    return task


def task_name(text: str) -> str:
    """A task's name made of a folder's: all characters other than letters, digits, ``_`` and ``-``
    become ``_``."""
    return re.sub(r"[^\w-]+", "_", text)


def detect_spec(
    rows: Table,
    name: str,
    kind: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_words: Mapping[Any, str] | None = None,
    **others: Any,
) -> TaskSpec:
    """How to read the rows of the train split and of the others.

    The source text is the task's name and every text column's name and value; in language modelling
    it is only the values. Columns of instruction data (`PROMPTS` and one of `RESPONSES`, or
    ``messages``) need no options, nor does the column ``text`` alone, which is running text.

    Args:
        rows: of the train split.
        name: of the task.
        kind: classification, regression, generation or language_modeling; default: fractions (or
            more than 50 different numbers) are regression, up to 50 labels classification.
        text_columns, label_column: default: the label is the first column called label, target,
            score, ...; the texts are the other columns that hold text, except ids.
        label_words: word the model writes for each label (default: the label itself).
        others: fields of `TaskSpec`, as ``metrics``, ``max_source_length`` and
            ``max_target_length`` (default 128 and 16, of instruction data 512 and 256).

    Raises:
        ValueError: no label or text column, or only one label; the message names the place of the
            first row.
    """
    first, where = rows[0]
    columns = list(first)
    template, answer = _instructions(columns)
    is_labelled = bool(label_column or label_words)
    if template and kind in (None, "generation") and not (text_columns or is_labelled):
        others = {"max_source_length": 512, "max_target_length": 256, **others}
        return TaskSpec(name, template, answer, kind="generation", **others)
    alone = columns == [TEXT_COLUMN]  # whose first paragraph may be a number
    running = kind == "language_modeling" or (kind is None and alone and not is_labelled)
    label = "" if running else label_column or next((c for c in LABEL_COLUMNS if c in columns), "")
    if not label and not running:
        raise ValueError(
            f"{where}: no label column among {', '.join(columns)}; expected one of "
            f"{', '.join(LABEL_COLUMNS)}, or give label_column (--label_column NAME)"
        )
    texts = text_columns or [
        column
        for column, cell in first.items()
        if isinstance(cell, str)
        and (alone or not is_number(cell))
        and column != label
        and column.lower() not in ID_COLUMNS
    ]
    if not texts:
        raise ValueError(f"{where}: no text column among {', '.join(columns)}; give text_columns")
    if running:
        template = " ".join(f"{{{c}}}" for c in texts)
        return TaskSpec(name, template, label, kind="language_modeling", **others)
    words: Mapping[Any, str] = label_words or {}
    labels = {read_cell(row, label, place, f"label_column of task {name}") for row, place in rows}
    kind = kind or ("classification" if words else _kind(labels))
    if kind == "classification" and not words:
        # Every label is its own word, numbers in numeric order: the second is the positive class of
        # F1.
        numeric = all(map(is_number, labels))
        words = {x: x for x in sorted(labels, key=(lambda x: (float(x), x)) if numeric else None)}
        if len(words) < 2:
            raise ValueError(
                f"{where}: classification needs at least two different labels; got "
                f"{', '.join(words)}"
            )
    template = " ".join([name, *(f"{c}: {{{c}}}" for c in texts)])
    words = words if kind == "classification" else {}
    return TaskSpec(name, template, label, words, kind, **others)


def _instructions(columns: Sequence[str]) -> tuple[str, str]:
    """Template and column of the answer of instruction data; empty if the columns are others."""
    if MESSAGES in columns:
        return f"{{{MESSAGES}}}", MESSAGES
    prompts = [column for column in PROMPTS if column in columns]
    answer = next((column for column in RESPONSES if column in columns), "")
    return (" ".join(f"{{{column}}}" for column in prompts), answer) if answer else ("", "")


def _kind(labels: set[str]) -> str:
    many = len(labels) > MAX_CLASSES
    if all(map(is_number, labels)) and (many or not all(float(x).is_integer() for x in labels)):
        return "regression"
    return "generation" if many else "classification"
