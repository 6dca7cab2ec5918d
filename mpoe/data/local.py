"""Tasks from a folder of the user's own files: train, validation and test as .jsonl, .csv, .tsv or .txt, also .gz."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpoe.data.documentation import SPLITS
from mpoe.data.files import SPLIT_STEMS, TABLE_SUFFIXES, Row, file_format, find_split_file, read_paragraphs, read_table
from mpoe.data.splits import with_subsets, with_validation_test_split
from mpoe.data.task import KINDS, Example, Task

LABEL_COLUMNS = ("label", "labels", "target", "score", "class", "similarity", "gold_label", "rating", "category")
ID_COLUMNS = frozenset(("id", "idx", "index", "guid", "uid", "pairid", "promptid", "source_id"))
MAX_CLASSES = 50
DEFAULT_METRICS = {
    "regression": ("pearson", "spearman"),
    "generation": ("token_f1", "exact_match"),
    "language_modeling": ("perplexity",),
}


@dataclass(frozen=True)
class LocalTask(Task):
    """A task read from files. ``folder``: where they lie; ``files``: the file of each split; columns as used."""

    folder: Path = Path()
    files: Mapping[str, Path] = field(default_factory=dict, hash=False)
    text_columns: tuple[str, ...] = ()
    label_column: str = ""


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
    max_source_length: int = 128,
    max_target_length: int = 16,
    split_validation_test: bool = False,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    data_seed: int = 0,
) -> Task:
    """Read and check every split under ``data_dir`` and make a task of them.

    Args:
        data_dir: folder with a train file and at least one of validation (valid, val, dev) and test.
        name: of the task (default: the folder's); it begins every source text.
        kind: classification, regression, generation or language_modeling; default: .txt files are language modelling,
            fractions (or more than 50 different numbers) regression, up to 50 labels classification.
        text_columns, label_column: default: the label is the first column called label, target, score, ...; the texts
            are the other columns that hold text, but for ids.
        label_words: word the model writes for each label (default: the label itself).
        column_names: columns of csv/tsv files that have no header line.
        metrics: default by kind.
        split_validation_test: take the test items out of the validation items; a test file is then not read.
        n_train, n_val, n_test, data_seed: sizes of random subsets.

    Returns:
        a LocalTask, or an equivalent of it with smaller splits. Regression targets are rounded to the nearest 0.2 and
        written with one decimal, as T5 does for STS-B.

    Raises:
        ValueError: a missing folder or file, a missing column, a malformed line, an unknown label (file and line).
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir must be an existing folder; got {str(data_dir)!r}")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    files = find_files(folder, needs_test=not split_validation_test)
    common: dict[str, Any] = {
        "name": name or task_name(folder.resolve().name),
        "max_source_length": max_source_length,
        "max_target_length": max_target_length,
        "description": f"local files in {folder}",
        "folder": folder,
        "files": files,
    }
    if file_format(files["train"]) == ".txt":
        if kind not in (None, "language_modeling"):
            raise ValueError(f"kind must be language_modeling for .txt files; got {kind!r}")
        texts = {split: tuple(Example(text) for text in read_paragraphs(path)) for split, path in files.items()}
        settings: dict[str, Any] = {"kind": "language_modeling", "metrics": ("perplexity",)}
    else:
        tables = {split: read_table(path, column_names) for split, path in files.items()}
        reader = TableReader.detect(files, tables, common["name"], kind, text_columns, label_column, label_words)
        texts = {split: reader.examples(files[split], rows) for split, rows in tables.items()}
        settings = reader.task_settings(metrics)
    task: Task = LocalTask(rows=lambda split: _rows_of(texts, folder, split), **settings, **common)
    if split_validation_test:
        task = with_validation_test_split(task, data_seed)
    if (n_train, n_val, n_test) != (None, None, None):
        task = with_subsets(task, n_train, n_val, n_test, data_seed)
    return task


def task_name(text: str) -> str:
    """A task's name made of a folder's: whatever is no letter, digit, ``_`` or ``-`` becomes ``_``."""
    return re.sub(r"[^\w-]+", "_", text)


def find_files(folder: Path, needs_test: bool = True) -> dict[str, Path]:
    """The file of each split that is there; ValueError without a train file, or without anything to evaluate on."""
    files = {}
    for split in SPLITS:
        path = find_split_file(folder, split) if split != "test" or needs_test else None
        if path is not None:
            files[split] = path
    wanted = "train" if "train" not in files else "validation" if "validation" not in files else ""
    if wanted == "validation" and "test" in files:
        wanted = ""  # a final test alone will do
    if wanted:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        names = " or ".join(SPLIT_STEMS[wanted])
        raise ValueError(
            f"data_dir {folder} must hold a {wanted} file ({names} with {', '.join((*TABLE_SUFFIXES, '.txt'))}, "
            f"also .gz); got {there}"
        )
    return files


@dataclass(frozen=True)
class TableReader:
    """How the rows of one folder become examples. ``words``: label as text in the file -> word the model writes."""

    name: str
    kind: str
    text_columns: tuple[str, ...]
    label_column: str
    words: Mapping[str, str]

    @classmethod
    def detect(
        cls,
        files: Mapping[str, Path],
        tables: Mapping[str, list[Row]],
        name: str,
        kind: str | None,
        text_columns: Sequence[str] | None,
        label_column: str | None,
        label_words: Mapping[Any, str] | None,
    ) -> TableReader:
        """Settle columns and kind from the train rows; see :func:`load_task_from_folder`."""
        path, rows = files["train"], tables["train"]
        columns = list(rows[0].values)
        if kind == "language_modeling":
            label = ""
        else:
            label = label_column or next((c for c in LABEL_COLUMNS if c in columns), "")
            if not label:
                raise ValueError(
                    f"{path}, line {rows[0].line}: no label column among {', '.join(columns)}; expected one of "
                    f"{', '.join(LABEL_COLUMNS)}, or give label_column"
                )
        texts = tuple(text_columns or _detect_text_columns(rows[0].values, label))
        if not texts:
            raise ValueError(
                f"{path}, line {rows[0].line}: no text column among {', '.join(columns)}; give text_columns"
            )
        labels = [] if not label else [_value(path, row, label) for row in rows]
        found = kind or _detect_kind(labels, label_words)
        words: dict[str, str] = {}
        if found == "classification":
            words = _label_words(path, rows, labels, label_words)
        return cls(name, found, texts, label, words)

    def examples(self, path: Path, rows: list[Row]) -> tuple[Example, ...]:
        """Examples of one file; ValueError naming file and line for a missing column, value or an unknown label."""
        return tuple(self._example(path, row) for row in rows)

    def task_settings(self, metrics: Sequence[str] | None) -> dict[str, Any]:
        """Fields of the task that follow from the columns."""
        labels = tuple(dict.fromkeys(self.words.values()))
        default = DEFAULT_METRICS.get(self.kind, ("accuracy", "f1" if len(labels) == 2 else "macro_f1", "matthews"))
        return {
            "kind": self.kind,
            "labels": labels,
            "metrics": tuple(metrics or default),
            "text_columns": self.text_columns,
            "label_column": self.label_column,
        }

    def _example(self, path: Path, row: Row) -> Example:
        values = [_value(path, row, column) for column in self.text_columns]
        if self.kind == "language_modeling":
            return Example(" ".join(values))
        pairs = zip(self.text_columns, values, strict=True)
        source = f"{self.name} " + " ".join(f"{column}: {value}" for column, value in pairs)
        label = _value(path, row, self.label_column)
        if self.kind == "generation":
            return Example(source, label)
        if self.kind == "regression":
            return Example(source, regression_text(_as_number(path, row, label)))
        if label not in self.words:
            known = ", ".join(list(self.words)[:10])
            raise ValueError(
                f"{path}, line {row.line}: {self.label_column} must be a training label ({known}); got {label!r}"
            )
        return Example(source, self.words[label])


def regression_text(value: float) -> str:
    """``value`` rounded to the nearest 0.2, with one decimal: 2.57 -> "2.6"."""
    return f"{round(value * 5) / 5 + 0.0:.1f}"


def _rows_of(texts: Mapping[str, tuple[Example, ...]], folder: Path, split: str) -> tuple[Example, ...]:
    if split not in texts:
        raise ValueError(f"data_dir {folder} has no {split} file; use split_validation_test or add {split}.jsonl")
    return texts[split]


def _value(path: Path, row: Row, column: str) -> str:
    """Text of one cell. Numbers lose a needless ``.0``, so that 1 and 1.0 are one label."""
    if column not in row.values:
        close = difflib.get_close_matches(column, list(row.values), n=2)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        there = ", ".join(row.values) or "no columns"
        raise ValueError(f"{path}, line {row.line}: column {column!r} is missing{hint}; got {there}")
    value = row.values[column]
    if value is None or isinstance(value, dict | list):
        raise ValueError(f"{path}, line {row.line}: column {column!r} must hold a text or a number; got {value!r}")
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _detect_text_columns(values: Mapping[str, Any], label: str) -> list[str]:
    def is_text(column: str, value: Any) -> bool:
        return column != label and column.lower() not in ID_COLUMNS and isinstance(value, str) and not _is_number(value)

    return [column for column, value in values.items() if is_text(column, value)]


def _detect_kind(labels: Sequence[str], label_words: Mapping[Any, str] | None) -> str:
    if label_words:
        return "classification"
    different = set(labels)
    if all(_is_number(label) for label in different):
        whole = all(float(label).is_integer() for label in different)
        return "classification" if whole and len(different) <= MAX_CLASSES else "regression"
    return "classification" if len(different) <= MAX_CLASSES else "generation"


def _label_words(
    path: Path, rows: list[Row], labels: Sequence[str], label_words: Mapping[Any, str] | None
) -> dict[str, str]:
    """Words by label text, numbers in numeric order: the second is the positive class of F1."""
    different = set(labels)
    if label_words is None:
        numeric = all(_is_number(label) for label in different)
        words = {label: label for label in sorted(different, key=(lambda x: (float(x), x)) if numeric else None)}
    else:
        words = {str(int(k)) if isinstance(k, bool) else str(k): str(word) for k, word in label_words.items()}
        for row, label in zip(rows, labels, strict=True):
            if label not in words:
                raise ValueError(f"{path}, line {row.line}: label_words has no word for {label!r}; got {list(words)}")
    if len(words) < 2:
        raise ValueError(f"{path}: classification needs at least two different labels; got {', '.join(words)}")
    return words


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _as_number(path: Path, row: Row, text: str) -> float:
    if not _is_number(text):
        raise ValueError(f"{path}, line {row.line}: expected a finite number; got {text!r}")
    return float(text)
