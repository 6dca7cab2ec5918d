"""A task described as data: how a row becomes text, the words of its labels, and where its rows
are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

from mpoe.config.checks import check_fields, check_type, hint
from mpoe.data.task import Example, Task, is_number

DEFAULT_METRICS = {
    "regression": ("pearson", "spearman"),
    "generation": ("token_f1", "exact_match"),
    "language_modeling": ("perplexity",),
}
MESSAGES = "messages"  # column of conversations: lists of {"role": ..., "content": ...}
_COLUMN = re.compile(r"\{([^{}]+)\}")
Cells = Mapping[str, Any]  # one row, by column


class Section(dict[str, Any]):
    """A row of a text file: a part of the text, which the next row goes on with."""


_KINDS = (
    (str, "a text", ("name", "template", "label_column", "kind", "data_dir", "folder")),
    (bool, "true or false", ("hidden_test", "skip_malformed")),
    (list | tuple, "a list of texts", ("metrics", "column_names")),
    (Mapping, "a mapping", ("label_words", "renamed_columns")),
)


@dataclass(frozen=True)
class HubData:
    """Where a task's rows are on the Hugging Face hub.

    ``path``: name of the data set; ``config``, ``revision`` and ``folder`` (inside the repository):
    if needed;
    ``splits``: its names of splits that are not called train, validation and test.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    folder: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class TaskSpec:
    """Description of a task, as in a YAML file under the task's name.

    Args:
        name: name of the task.
        template: the model's input, with columns in braces: ``"is this good? {sentence}"``.
            ``{choices.text.0}`` looks inside a cell.
        label_column: column of the answer; not needed for language modelling.
        label_words: label in the data -> word the model writes. Several labels may share a word, so
            one task can read data sets that spell their labels differently; rows whose label has
            the word None are left out. The second word is the positive class of F1.
        kind: default: classification if there are label_words.
        metrics: the task is judged by the first one; default: by kind.
        max_source_length, max_target_length: in tokens.
        renamed_columns: name in the data -> name in the template, for data sets with other names.
        hidden_test: the test labels are not public, so no test file is read.
        data_dir: folder with the files of this task alone.
        folder: usual name of the task's folder in a collection, where it is not ``name``.
        column_names: columns of csv and tsv files without a header line.
        skip_malformed: leave out lines of csv and tsv files with a wrong number of columns, instead
            of refusing them.
        hub: the data set on the hub: its name, or a mapping of the fields of `HubData`; afterwards
            a `HubData` or None.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what was given.
    """

    name: str
    template: str = ""
    label_column: str = "label"
    label_words: Mapping[Any, str | None] = field(default_factory=dict, hash=False)
    kind: str = ""
    metrics: Sequence[str] = ()
    max_source_length: int = 128
    max_target_length: int = 16
    renamed_columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    hidden_test: bool = False
    data_dir: str = ""
    folder: str = ""
    column_names: Sequence[str] = ()
    skip_malformed: bool = False
    hub: Any = field(default=None, hash=False)

    def __post_init__(self) -> None:
        for kind, wanted, names in _KINDS:
            for name in names:
                check_type(f"{name} of task {self.name}", getattr(self, name), kind, wanted)
        for column in self.column_names:
            check_type(f"every item of column_names of task {self.name}", column, str, "a text")
        self._settle("kind", self.kind or ("classification" if self.label_words else ""))
        self._settle("label_words", self._words())
        of_labels = ("accuracy", "f1" if len(self.labels) == 2 else "macro_f1", "matthews")
        self._settle("metrics", tuple(self.metrics) or DEFAULT_METRICS.get(self.kind, of_labels))
        self._settle("column_names", tuple(self.column_names))
        self._settle("hub", _hub(self.name, self.hub))
        if not self.columns or re.search("[{}]", _COLUMN.sub("", self.template)):
            raise ValueError(
                f"template of task {self.name} must name columns in braces, as in 'is it good? "
                f"{{sentence}}'; got {self.template!r}"
            )
        self.task(rows=None)  # which checks the rest

    @classmethod
    def from_mapping(cls, name: str, values: Any) -> TaskSpec:
        """The task called ``name`` as it was read from a file; raises TypeError or ValueError for
        invalid fields."""
        if isinstance(values, Mapping):  # some of earlier versions have a description
            values = {key: value for key, value in values.items() if key != "description"}
        check_fields(cls, values, f"task {name}")
        if values.get("name", name) != name:
            raise ValueError(
                f"name of task {name} must be what its description stands under; got "
                f"{values['name']!r}"
            )
        return cls(**{**values, "name": name})

    def to_mapping(self) -> dict[str, Any]:
        """Fields for `from_mapping`, JSON-able, without those that have their default value."""
        defaults = {
            f.name: f.default if f.default_factory is MISSING else f.default_factory()
            for f in fields(self)
        }
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "name" and value != defaults[name]
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the template asks for."""
        return tuple(dict.fromkeys(_COLUMN.findall(self.template)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The different words of the labels, in their order."""
        return tuple(dict.fromkeys(word for word in self.label_words.values() if word is not None))

    def task(self, rows: Any) -> Task:
        """The task with these rows: ``rows(split)`` yields items."""
        names = ("name", "kind", "labels", "metrics", "max_source_length", "max_target_length")
        return Task(rows=rows, **{name: getattr(self, name) for name in names})

    def example(self, cells: Cells, where: str) -> Example | None:
        """One row as text; None if there is no text or its label is one to leave out.

        Raises:
            ValueError: a missing column, a value that is neither text nor number, a label without a
            word, or messages that are no conversation.
        """
        ends = not isinstance(cells, Section)
        if self.renamed_columns:
            cells = {self.renamed_columns.get(c, c): v for c, v in cells.items()} | dict(cells)
        if self.columns == (MESSAGES,):
            return _conversation(cells, where)
        number = None
        is_text = self.kind == "language_modeling"
        asker = f"label_column of task {self.name}"
        label = "" if is_text else read_cell(cells, self.label_column, where, asker)
        target: Any = label
        if self.kind == "regression":
            if not is_number(label):
                raise ValueError(f"{where}: expected a finite number; got {label!r}")
            number = float(label)
            target = regression_text(number)
        if self.kind == "classification":
            if label not in self.label_words:
                known = ", ".join(list(self.label_words)[:10])
                raise ValueError(
                    f"{where}: label_words of task {self.name} must have a word for {label!r}, "
                    f"which is in column {self.label_column!r}; it has words for {known}"
                )
            target = self.label_words[label]
        if target is None:  # whatever else the row holds
            return None
        asker = f"template of task {self.name}"
        source = _COLUMN.sub(
            lambda match: read_cell(cells, match[1], where, asker, is_text), self.template
        )
        return Example(source, target, number, ends=ends) if source.strip() else None

    def _words(self) -> dict[str, str | None]:
        where = f"label_words of task {self.name}"
        wanted = "a text (YAML reads yes, no, on and off as true and false: put them in quotes)"
        words = {}
        for key, word in self.label_words.items():
            label = cell_text(key, f"a label in {where}")
            check_type(f"the word of label {label} in {where}", word, str | None, wanted)
            words[label] = word
        if self.kind == "classification" and len(set(words.values()) - {None}) < 2:
            raise ValueError(
                f"{where} must give at least two different words, label -> word; got "
                f"{words or 'none'}"
            )
        return words

    def _settle(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)


def _conversation(cells: Cells, where: str) -> Example:
    """The conversation in the column `MESSAGES`; its source is the text of all messages but the
    last."""
    cell = cells.get(MESSAGES)
    said = [message for message in cell or () if isinstance(message, Mapping)]
    messages: Any = tuple((message.get("role"), message.get("content")) for message in said)
    fits = all(isinstance(role, str) and isinstance(text, str) for role, text in messages)
    if len(messages) < max(2, len(cell or ())) or not fits or messages[-1][0] != "assistant":
        raise ValueError(
            f'{where}: messages must be two or more of {{"role": ..., "content": ...}}, the last '
            f"of the assistant; got {cell!r}"
        )
    source = "\n".join(f"{role}: {text}" for role, text in messages[:-1])
    return Example(source, messages[-1][1], messages=messages)


def read_cell(cells: Cells, column: str, where: str, asker: str, as_it_is: bool = False) -> str:
    """Text of the cell in ``column``; ``choices.text.0`` is the first of the texts in the cell
    ``choices``. Without blanks around it, unless it is read ``as_it_is``.

    Raises:
        ValueError: there is no such column (the message says what needs it), or it holds neither a
            text nor a number.
    """
    value: Any = cells
    for part in [column] if column in cells else column.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(
                f"{where}: column {column!r} is missing{hint(column, list(cells))}, which {asker} "
                f"asks for; got {', '.join(cells) or 'no columns'}"
            )
    if as_it_is and isinstance(value, str):
        return value
    return cell_text(value, f"{where}: column {column!r}")


def cell_text(value: Any, where: str) -> str:
    """Text of one cell. Numbers lose a redundant ``.0`` and booleans become 0 and 1, so that 1, 1.0
    and true are the same label.

    Raises:
        ValueError: neither a text nor a number.
    """
    if value is None or isinstance(value, dict | list):
        raise ValueError(f"{where} must hold a text or a number; got {value!r}")
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    return str(value).strip()


def regression_text(value: float) -> str:
    """``value`` rounded to the nearest 0.2, with one decimal, as T5 writes STS-B's scores: 2.57 ->
    "2.6"."""
    return f"{round(value * 5) / 5 + 0.0:.1f}"


def _hub(task: str, value: Any) -> HubData | None:
    if value is None or isinstance(value, HubData):
        return value
    values = {"path": value} if isinstance(value, str) else value
    check_fields(HubData, values, f"hub of task {task}")
    check_type(f"path of hub of task {task}", values.get("path"), str, "a data set's name")
    return HubData(**values)
