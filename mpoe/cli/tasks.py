"""The tasks of a command: the user's own folders and files, or tasks by name."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpoe.cli.command import comma_separated, option
from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.options import read_json_option
from mpoe.data.spec import TaskSpec
from mpoe.data.tables import find_files
from mpoe.data.task import Task, with_packages, with_subsets, with_validation_test_split
from mpoe.data.tasks import (
    find_spec,
    get_task,
    load_task,
    load_task_from_folder,
    read_task_file,
    task_name,
    task_names,
)
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ
from mpoe.training import find_last_checkpoint
from mpoe.training.output_dir import holds_earlier_model, read_record

DEFAULT_TASKS = {SEQ2SEQ: ["doc_module"], CAUSAL: ["doc_lm"], ENCODER: ["doc_module"]}
# style of a model -> an example, the kinds of task it does
_STYLES = {
    SEQ2SEQ: ("a T5 (--model t5)", ("classification", "regression", "generation")),
    CAUSAL: ("a GPT-2 (--model gpt2)", ("language_modeling", "generation")),
    ENCODER: ("a BERT", ("classification", "regression")),
}

# options that say how to read a folder's columns, in place of a description
DETECTION = ("kind", "text_columns", "label_column", "label_words", "column_names")

LENGTHS = ("max_source_length", "max_target_length")

SOURCES = {"data_dir", "tasks", "task_file", "eval_tasks"}  # options that select the items


@dataclass
class DataOptions:
    """The source of the items."""

    data_dir: str | None = option(
        None,
        "folder with train, validation, test files (.jsonl .csv .tsv .txt, also .gz), or a data "
        "set on the hub; with --tasks, one such folder per task",
    )
    tasks: list[str] = option(
        [],
        "names of tasks: folders in --data_dir, tasks of --task_file, known ones (rte, imdb, ...; "
        "from the hub where they have no folder) or embedded ones (doc_module, doc_lm, ...)",
    )
    task_file: list[str] = option(
        [], "YAML or JSON files that describe tasks; without --tasks all of them"
    )
    eval_tasks: list[str] = option([], "tasks to evaluate on; default: those trained on")
    temperature: float = option(1.0, "tasks are drawn with p ~ size^(1/temperature)")
    kind: str | None = option(
        None, "classification, regression, generation or language_modeling; default: detected"
    )
    text_columns: list[str] = option([], "columns of the input text; default: detected")
    label_column: str | None = option(None, "column of the answer; default: detected")
    label_words: str | None = option(
        None, 'JSON: label -> word to write, {"0": "bad", "1": "good"}'
    )
    column_names: list[str] = option([], "columns of csv/tsv files without a header")
    metrics: list[str] = option([], "metrics of the task; default: by kind")
    max_source_length: int | None = option(
        None, "tokens of the input, or of a block of text (the task's; 128)"
    )
    max_target_length: int | None = option(None, "tokens of the answer (the task's; 16)")
    split_validation_test: bool = option(False, "take the test items out of the validation items")
    n_train: int | None = option(None, "use a random subset of so many training items")
    n_val: int | None = option(None, "the same for validation")
    n_test: int | None = option(None, "the same for test")

    LEAST = (("max_source_length", 2), ("max_target_length", 2))

    def __post_init__(self) -> None:
        # lists may also be comma-separated, as in the original's configurations
        for name in ("tasks", "eval_tasks", "task_file", "text_columns", "column_names", "metrics"):
            setattr(self, name, comma_separated(getattr(self, name)))
        if isinstance(self.label_words, str):  # a mapping in the record of a run
            words = read_json_option("label_words", self.label_words)
            if not isinstance(words, dict):
                raise CommandError(
                    f"label_words must be a JSON object, label -> word; got {self.label_words}"
                )
            self.label_words = words  # type: ignore[assignment]

    def of(self, *names: str) -> dict:
        """Those of the options that are set."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value not in (None, [])}


def _one_task(
    name: str, options: DataOptions, described: Mapping[str, TaskSpec], data_seed: int
) -> Task:
    """The task called ``name``: a folder in ``data_dir``, read by its description or by detection;
    else a task by name. The empty name means ``data_dir`` itself. It has the requested lengths,
    metrics, splits and sizes."""
    detection = options.of(*DETECTION)
    spec = described.get(name) or find_spec(name)
    folder = None  # of the task's files in data_dir: its name, or the usual name of its folder
    if options.data_dir is not None:
        entries = [name, spec.folder] if spec is not None and spec.folder else [name]
        folder = next(
            filter(Path.is_dir, (Path(options.data_dir) / entry for entry in entries)), None
        )
    if not name or (folder is not None and (spec is None or detection)):
        if folder is not None and "validation" not in find_files(folder):
            print(
                f"{folder} holds no validation file: a tenth of the training items, at most 1,000, "
                "is held out"
            )
        # en/s and fr/s are two tasks, en_s and fr_s
        given_name = task_name(os.path.normpath(name)) if name else None
        task = load_task_from_folder(folder or str(options.data_dir), given_name, **detection)
    elif detection:
        raise CommandError(
            f"{next(iter(detection))} says how a folder is read; task {name} has none in data_dir"
        )
    elif spec is not None:
        task = load_task(spec, folder)
    elif options.data_dir is not None and name not in task_names():
        known = [*described, *task_names()]
        raise CommandError(
            f"data_dir {options.data_dir} has no folder {name!r}, nor is there a task of that name"
            f"{close_matches(name, known)}; known: {', '.join(known)}"
        )
    else:
        task = get_task(name)
    changes = options.of(*LENGTHS)
    if options.metrics:
        changes["metrics"] = tuple(options.metrics)
    task = with_packages(dataclasses.replace(task, **changes))
    if options.split_validation_test:
        task = with_validation_test_split(task, data_seed)
    return with_subsets(task, options.n_train, options.n_val, options.n_test, data_seed)


def read_descriptions(files: Sequence[str]) -> dict[str, TaskSpec]:
    """The tasks that ``task_file`` describes, by name.

    Raises:
        ValueError: as `read_task_file`, or two files describe one task.
    """
    described: dict[str, TaskSpec] = {}
    for file in files:
        specs = read_task_file(file)
        twice = sorted(described.keys() & specs)
        if twice:
            raise CommandError(
                f"task_file: {file} describes {', '.join(twice)} again; a task has one description"
            )
        described |= specs
    return described


def resolve(
    names: Sequence[str],
    options: DataOptions,
    style: str,
    data_seed: int = 0,
    described: Mapping[str, TaskSpec] | None = None,
) -> list[Task]:
    """The tasks of these names.

    Without names: the folder ``data_dir`` itself, or every task of ``task_file``, or the embedded
    ones of the model's
    style. ``described``: the contents of ``task_file``, if already read.

    Raises:
        ValueError: unknown task, missing folder, file or column, a malformed line (file and line),
            two tasks with the same name, a kind of task that a model of this ``style`` does not
            support.
    """
    data_dir = options.data_dir
    if data_dir is not None and (names or options.task_file) and not Path(data_dir).is_dir():
        raise CommandError(f"data_dir must be an existing folder; got {data_dir!r}")
    described = read_descriptions(options.task_file) if described is None else described
    if not names and options.task_file:
        names = list(described)
    names = names or (DEFAULT_TASKS[style] if data_dir is None else [""])
    tasks = [_one_task(name, options, described, data_seed) for name in names]
    chosen = [task.name for task in tasks]
    if len(set(chosen)) < len(chosen):
        raise CommandError(f"tasks must have different names; got {', '.join(chosen)}")
    for task in tasks:
        if task.kind not in _STYLES[style][1]:
            example, kinds = _STYLES[style]
            fits = " or ".join(other for other, theirs in _STYLES.values() if task.kind in theirs)
            raise CommandError(
                f"task {task.name} is {task.kind}; {example} does {', '.join(kinds)} (use {fits}, "
                "or set --kind)"
            )
    if style == ENCODER and len(tasks) > 1:
        raise CommandError(
            f"tasks must be one for an encoder, which has one head; got {', '.join(chosen)}"
        )
    return tasks


# -------------------------------------------------------------- for commands that look at a run's
# model


def model_of_experiment(folder: str) -> str:
    """The final model of a run, or its last complete checkpoint if the run has not finished.

    Raises: CommandError: no such folder, or it has neither.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CommandError(f"load_experiment must be the folder of an earlier run; got {folder!r}")
    is_model = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    if is_model and not holds_earlier_model(path):
        return str(path)
    checkpoint = find_last_checkpoint(path)
    if checkpoint is None:
        raise CommandError(
            f"load_experiment: {folder} holds neither its run's model nor a complete checkpoint"
        )
    return str(checkpoint)


def data_of_run(
    model_dir: str, data: DataOptions, flags: set[str]
) -> tuple[DataOptions, int, dict[str, TaskSpec] | None]:
    """Data options as in the run whose model or checkpoint is in ``model_dir``, unless a flag says
    otherwise: lengths, columns, label words, and the items if no flag selects any.

    Returns:
        The options, the seed that split and drew the run's items (0 without a run; with another
        one, split_validation_test would test on items that the run validated on), and the tasks
        that its ``task_file`` described at that time (None: none, or another file is given).

    Raises:
        ValueError: ``run.json`` cannot be read.
    """
    folder = Path(model_dir)
    run = read_record(folder) or read_record(folder.resolve().parent) or {}
    if holds_earlier_model(folder):
        print(f"{folder} holds the model of a run before the one in run.json, which is not used")
        run = {}
    kept = run.get("data", {})
    names = {f.name for f in dataclasses.fields(DataOptions) if f.name not in flags} & set(kept)
    if flags & SOURCES:
        names -= SOURCES
    taken = {name: kept[name] for name in sorted(names) if kept[name] != getattr(data, name)}
    if taken:
        print("as in training: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    training = run.get("training", {})
    of_earlier = training.get("data_seed")
    if of_earlier is None:
        of_earlier = training.get("seed", 0)
    data = dataclasses.replace(data, **taken) if taken else data
    described = {} if "task_file" in flags else run.get("described") or {}
    specs = {name: TaskSpec.from_mapping(name, values) for name, values in described.items()}
    return data, int(run.get("drawn_by", of_earlier)), specs or None
