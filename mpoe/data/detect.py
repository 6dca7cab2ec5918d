"""Detects columns, kind of task and label words of a user's table from its first split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.data.files import Row
from mpoe.data.spec import MESSAGES, TaskSpec, is_number, read_cell

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
    :func:`mpoe.data.local.load_task_from_folder`. The source text is the task's name and every text column's name and
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
