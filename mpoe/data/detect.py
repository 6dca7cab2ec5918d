"""Tasks of data without a description: columns, kind and labels are detected from the training rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.data.spec import MESSAGES, HubData, TaskSpec, is_number, read_cell
from mpoe.data.splits import with_subsets, with_validation_test_split
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
from mpoe.data.task import Task

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
    texts = text_columns or [c for c in columns if c != label and _is_text(c, first[c])]
    if not texts:
        raise ValueError(f"{where}: no text column among {', '.join(columns)}; give text_columns")
    words: Mapping[Any, str] = label_words or {}
    if not running:
        labels = {read_cell(row, label, place, f"label_column of task {name}") for row, place in rows}
        kind = kind or ("classification" if words else _kind(labels))
        if kind == "classification" and not words:
            words = _numeric_order(labels)
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


def _is_text(column: str, value: Any) -> bool:
    return column.lower() not in ID_COLUMNS and isinstance(value, str) and not is_number(value)


def _kind(labels: set[str]) -> str:
    if all(map(is_number, labels)) and (len(labels) > MAX_CLASSES or not all(float(x).is_integer() for x in labels)):
        return "regression"
    return "classification" if len(labels) <= MAX_CLASSES else "generation"


def _numeric_order(labels: set[str]) -> dict[str, str]:
    """Every label as its own word, numbers in numeric order: the second is the positive class of F1."""
    numeric = all(map(is_number, labels))
    return {label: label for label in sorted(labels, key=(lambda x: (float(x), x)) if numeric else None)}
