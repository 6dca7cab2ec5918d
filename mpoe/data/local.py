"""Tasks from a folder of the user's own files: train, validation and test as .jsonl, .csv, .tsv or text, also .gz."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpoe.data.documentation import SPLITS
from mpoe.data.files import (
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    Row,
    find_split_file,
    has_header,
    is_text,
    read_paragraphs,
    read_table,
)
from mpoe.data.spec import MESSAGES, TaskSpec, is_number, read_cell
from mpoe.data.splits import with_subsets, with_validation_from_train, with_validation_test_split
from mpoe.data.task import KINDS, Example, Task


@dataclass(frozen=True)
class LocalTask(Task):
    """A task read from files. ``folder``: their folder; ``files``: the file of each split; ``spec``: how to read
    them."""

    folder: Path = Path()
    files: Mapping[str, Path] = field(default_factory=dict, hash=False)
    spec: TaskSpec | None = None


TEXT_COLUMN = "text"  # the only column of a text file


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
        data_dir: folder with a train file and perhaps validation (valid, val, dev) and test files; with neither, a
            tenth of the training items, at most a thousand, is held out for validation.
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
        a LocalTask, or an equivalent task with smaller splits. Regression targets are rounded to the nearest 0.2 and
        written with one decimal, as T5 does for STS-B.

    Raises:
        ValueError: a missing folder or file, a missing column, a malformed line, an unknown label (file and line).
    """
    folder = _existing(data_dir)
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    files = find_files(folder, needs_test=not split_validation_test)
    name = name or task_name(folder.resolve().name)
    asked = {"max_source_length": max_source_length, "max_target_length": max_target_length}
    lengths: dict[str, Any] = {name: length for name, length in asked.items() if length is not None}
    tables = {split: _read(path, column_names) for split, path in files.items()}
    if is_text(files["train"]):
        if kind not in (None, "language_modeling"):
            raise ValueError(f"kind must be language_modeling for .txt files; got {kind!r}")
        spec = TaskSpec(name, f"{{{TEXT_COLUMN}}}", kind="language_modeling", **lengths)
    else:
        where, first = files["train"], tables["train"]
        spec = detect_spec(where, first, name, kind, text_columns, label_column, label_words, metrics, **lengths)
    task: Task = _local_task(spec, folder, files, tables)
    if set(files) == {"train"}:
        task = with_validation_from_train(task)
    if split_validation_test:
        task = with_validation_test_split(task, data_seed)
    if (n_train, n_val, n_test) != (None, None, None):
        task = with_subsets(task, n_train, n_val, n_test, data_seed)
    return task


def load_described_task(spec: TaskSpec, data_dir: str | Path) -> LocalTask:
    """Read and check every split under ``data_dir`` as ``spec`` says; text files have the one column ``text``.

    Raises:
        ValueError: as :func:`load_task_from_folder`, and for a label without a word.
    """
    folder = _existing(data_dir)
    files = find_files(folder, needs_test=not spec.hidden_test)
    wanted = {*spec.columns, *spec.renamed_columns}
    tables = {}
    for split, path in files.items():
        headless = bool(spec.column_names) and not has_header(path, wanted)
        tables[split] = _read(path, spec.column_names if headless else None, spec.skip_malformed)
    return _local_task(spec, folder, files, tables)


def _read(path: Path, column_names: Sequence[str] | None, skip_malformed: bool = False) -> list[Row]:
    if not is_text(path):
        return read_table(path, column_names, skip_malformed)
    return [Row({TEXT_COLUMN: text}, number) for number, text in enumerate(read_paragraphs(path), start=1)]


def _local_task(
    spec: TaskSpec, folder: Path, files: Mapping[str, Path], tables: Mapping[str, Sequence[Row]]
) -> LocalTask:
    texts = {}
    for split, rows in tables.items():
        unit = "paragraph" if is_text(files[split]) else "line"
        texts[split] = spec.examples((row.values, f"{files[split]}, {unit} {row.line}") for row in rows)
    return LocalTask(
        **spec.task_fields(),
        rows=lambda split: _rows_of(texts, folder, split),
        folder=folder,
        files=files,
        spec=spec,
    )


def _existing(data_dir: str | Path) -> Path:
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir must be an existing folder; got {str(data_dir)!r}")
    return folder


def task_name(text: str) -> str:
    """A task's name made of a folder's: all characters other than letters, digits, ``_`` and ``-`` become ``_``."""
    return re.sub(r"[^\w-]+", "_", text)


def holds_train_alone(folder: Path) -> bool:
    """Whether there is nothing to evaluate on."""
    return not any(find_split_file(folder, split) for split in ("validation", "test"))


def find_files(folder: Path, needs_test: bool = True) -> dict[str, Path]:
    """The file of each existing split; ValueError without a train file."""
    files = {}
    for split in SPLITS:
        path = find_split_file(folder, split) if split != "test" or needs_test else None
        if path is not None:
            files[split] = path
    if "train" not in files:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"data_dir {folder} must hold a train file (train with "
            f"{', '.join((*TABLE_SUFFIXES, *TEXT_SUFFIXES))}, also .gz); got {there}"
        )
    return files


def _rows_of(texts: Mapping[str, tuple[Example, ...]], folder: Path, split: str) -> tuple[Example, ...]:
    if split not in texts:
        raise ValueError(f"data_dir {folder} has no {split} file; use split_validation_test or add {split}.jsonl")
    return texts[split]


# ------------------------------------------------- what is detected from the rows of the first split

LABEL_COLUMNS = ("label", "labels", "target", "score", "class", "similarity", "gold_label", "rating", "category")
ID_COLUMNS = frozenset(("id", "idx", "index", "guid", "uid", "pairid", "promptid", "source_id"))
MAX_CLASSES = 50
# columns of instruction data
PROMPTS, RESPONSES = ("prompt", "instruction", "input"), ("response", "completion", "output")


def detect_spec(
    path: Path | str,
    rows: Sequence[Row],
    name: str,
    kind: str | None = None,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    label_words: Mapping[Any, str] | None = None,
    metrics: Sequence[str] | None = None,
    **lengths: Any,
) -> TaskSpec:
    """How to read the rows of ``path`` (the train file, or a data set on the hub) and of the other splits; see
    `load_task_from_folder`. The source text is the task's name and every text column's name and
    value; in language modelling it is only the values. Columns of instruction data (`PROMPTS` and one of `RESPONSES`,
    or ``messages``) need no options.

    Raises:
        ValueError: no label or text column, or only one label; the message names file and line.
    """
    columns = list(rows[0].values)
    template, answer = _instructions(columns)
    if template and kind in (None, "generation") and not (text_columns or label_column or label_words):
        lengths = {"max_source_length": 512, "max_target_length": 256, **lengths}
        return TaskSpec(name, template, answer, kind="generation", metrics=tuple(metrics or ()), **lengths)
    where = f"{path}, line {rows[0].line}"
    if kind == "language_modeling":
        label = ""
    else:
        label = label_column or next((c for c in LABEL_COLUMNS if c in columns), "")
        if not label:
            raise ValueError(
                f"{where}: no label column among {', '.join(columns)}; expected one of {', '.join(LABEL_COLUMNS)}, "
                "or give label_column"
            )
    texts = list(text_columns or _text_columns(rows[0].values, label))
    if not texts:
        raise ValueError(f"{where}: no text column among {', '.join(columns)}; give text_columns")
    for column in text_columns or ():
        read_cell(rows[0].values, column, where, f"text_columns of task {name}")
    asker = f"label_column of task {name}"
    labels = [read_cell(row.values, label, f"{path}, line {row.line}", asker) for row in rows] if label else []
    found = kind or _kind(labels, label_words)
    words: Mapping[Any, str] = {}
    if found == "classification":
        words = label_words or _numeric_order(labels)
        if len(words) < 2:
            raise ValueError(f"{path}: classification needs at least two different labels; got {', '.join(words)}")
    parts = " ".join(f"{{{c}}}" if found == "language_modeling" else f"{c}: {{{c}}}" for c in texts)
    return TaskSpec(
        name=name,
        template=parts if found == "language_modeling" else f"{name} {parts}",
        label_column=label,
        label_words=words,
        kind=found,
        metrics=tuple(metrics or ()),
        **lengths,
    )


def _instructions(columns: Sequence[str]) -> tuple[str, str]:
    """Template and column of the answer of instruction data; empty if the columns are others."""
    if MESSAGES in columns:
        return f"{{{MESSAGES}}}", MESSAGES
    prompts = [column for column in PROMPTS if column in columns]
    answer = next((column for column in RESPONSES if column in columns), "")
    return (" ".join(f"{{{column}}}" for column in prompts), answer) if answer else ("", "")


def _text_columns(values: Mapping[str, Any], label: str) -> list[str]:
    def is_text(column: str, value: Any) -> bool:
        return column != label and column.lower() not in ID_COLUMNS and isinstance(value, str) and not is_number(value)

    return [column for column, value in values.items() if is_text(column, value)]


def _kind(labels: Sequence[str], label_words: Mapping[Any, str] | None) -> str:
    if label_words:
        return "classification"
    different = set(labels)
    if all(is_number(label) for label in different):
        whole = all(float(label).is_integer() for label in different)
        return "classification" if whole and len(different) <= MAX_CLASSES else "regression"
    return "classification" if len(different) <= MAX_CLASSES else "generation"


def _numeric_order(labels: Sequence[str]) -> dict[str, str]:
    """Every label as its own word, numbers in numeric order: the second is the positive class of F1."""
    different = set(labels)
    numeric = all(is_number(label) for label in different)
    return {label: label for label in sorted(different, key=(lambda x: (float(x), x)) if numeric else None)}
