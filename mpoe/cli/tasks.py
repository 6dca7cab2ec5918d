"""Which tasks a command works on: the user's own folders, or tasks by name."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.pretrained import CAUSAL, SEQ2SEQ

if TYPE_CHECKING:
    from mpoe.data.task import Task

DEFAULT_TASKS = {SEQ2SEQ: ("doc_module", "doc_kind", "doc_name"), CAUSAL: ("doc_lm",)}


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class DataOptions:
    """Where the items come from."""

    _argument_group_name = "data"

    data_dir: str | None = field(
        default=None,
        metadata=_help(
            "folder with train, validation, test files (.jsonl .csv .tsv .txt, also .gz); with --tasks, of such folders"
        ),
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata=_help("names of tasks; without --data_dir: embedded ones (doc_module, doc_lm, ...)"),
    )
    eval_tasks: list[str] = field(
        default_factory=list, metadata=_help("tasks to evaluate on; default: those trained on")
    )
    temperature: float = field(default=1.0, metadata=_help("tasks are drawn with p ~ size^(1/temperature)"))
    kind: str | None = field(
        default=None, metadata=_help("classification, regression, generation or language_modeling; default: detected")
    )
    text_columns: list[str] = field(
        default_factory=list, metadata=_help("columns of the input text; default: detected")
    )
    label_column: str | None = field(default=None, metadata=_help("column of the answer; default: detected"))
    label_words: str | None = field(
        default=None, metadata=_help('JSON: label -> word to write, {"0": "bad", "1": "good"}')
    )
    column_names: list[str] = field(default_factory=list, metadata=_help("columns of csv/tsv files without a header"))
    metrics: list[str] = field(default_factory=list, metadata=_help("metrics of the task; default: by kind"))
    max_source_length: int | None = field(
        default=None, metadata=_help("tokens of the input (128), and of a block in language modelling")
    )
    max_target_length: int | None = field(default=None, metadata=_help("tokens of the answer (16)"))
    split_validation_test: bool = field(
        default=False, metadata=_help("take the test items out of the validation items")
    )
    n_train: int | None = field(default=None, metadata=_help("use a random subset of so many training items"))
    n_val: int | None = field(default=None, metadata=_help("the same for validation"))
    n_test: int | None = field(default=None, metadata=_help("the same for test"))

    def __post_init__(self) -> None:
        # the lists may be written with commas too, as the original's configurations do
        for name in ("tasks", "eval_tasks", "text_columns", "column_names", "metrics"):
            values = getattr(self, name)
            setattr(self, name, [part.strip() for v in values for part in str(v).split(",") if part.strip()])
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0; got {self.temperature}")
        for name in ("n_train", "n_val", "n_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("max_source_length", "max_target_length"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} must be at least 2; got {value}")


def _label_words(text: str | None) -> dict[str, str] | None:
    if text is None:
        return None
    try:
        words = json.loads(text)
    except json.JSONDecodeError as error:
        raise CommandError(f"label_words: bad JSON at character {error.pos}: {error.msg}") from None
    if not isinstance(words, dict):
        raise CommandError(f"label_words must be a JSON object, label -> word; got {text}")
    return words


def _from_folder(entry: str, options: DataOptions, data_seed: int) -> Task:
    from mpoe.data.local import load_task_from_folder, task_name

    lengths = {
        name: getattr(options, name)
        for name in ("max_source_length", "max_target_length")
        if getattr(options, name) is not None
    }
    return load_task_from_folder(
        Path(options.data_dir or ".") / entry,
        task_name(os.path.normpath(entry)) if entry else None,  # en/s and fr/s are two tasks, en_s and fr_s
        kind=options.kind,
        text_columns=options.text_columns or None,
        label_column=options.label_column,
        label_words=_label_words(options.label_words),
        column_names=options.column_names or None,
        metrics=options.metrics or None,
        split_validation_test=options.split_validation_test,
        n_train=options.n_train,
        n_val=options.n_val,
        n_test=options.n_test,
        data_seed=data_seed,
        **lengths,
    )


def _by_name(name: str, options: DataOptions, data_seed: int) -> Task:
    from mpoe.data.splits import with_subsets, with_validation_test_split
    from mpoe.data.tasks import get_task

    task = get_task(name)
    for length in ("max_source_length", "max_target_length"):
        if getattr(options, length) is not None:
            task = dataclasses.replace(task, **{length: getattr(options, length)})
    if options.split_validation_test:
        task = with_validation_test_split(task, data_seed)
    if (options.n_train, options.n_val, options.n_test) != (None, None, None):
        task = with_subsets(task, options.n_train, options.n_val, options.n_test, data_seed)
    return task


def resolve(names: Sequence[str], options: DataOptions, style: str, data_seed: int = 0) -> list[Task]:
    """The tasks of these names (empty: the folder ``data_dir`` itself, or the embedded ones of the model's style).

    Raises:
        ValueError: unknown task, missing folder, file or column, a malformed line (file and line), two tasks of one
            name, a kind of task that a model of this ``style`` does not do.
    """
    if options.data_dir is not None:
        if not Path(options.data_dir).is_dir():
            raise CommandError(f"data_dir must be an existing folder; got {options.data_dir!r}")
        tasks = [_from_folder(name, options, data_seed) for name in names or [""]]
    else:
        tasks = [_by_name(name, options, data_seed) for name in names or DEFAULT_TASKS[style]]
    entries: dict[str, str] = {}
    for entry, task in zip(names, tasks, strict=False):
        if task.name in entries:
            raise CommandError(
                f"tasks must have different names; {entries[task.name]} and {entry} are both {task.name}"
            )
        entries[task.name] = entry
    for task in tasks:
        is_text = task.kind == "language_modeling"
        if style == SEQ2SEQ and is_text:
            raise CommandError(
                f"task {task.name} is language modelling; a T5 does text-to-text tasks (use --model gpt2)"
            )
        if style == CAUSAL and not is_text:
            raise CommandError(
                f"task {task.name} is {task.kind}; a GPT-2 does language modelling (use --model t5, or "
                "--kind language_modeling)"
            )
    return tasks
