"""`mpoe evaluate MODEL_DIR`: scores of a saved model on a split.

For a run, settings without an option are as in training.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import option, read_command
from mpoe.cli.tasks import DataOptions

if TYPE_CHECKING:
    from mpoe.data.spec import TaskSpec

SPLITS = ("train", "validation", "test")
SOURCES = {"data_dir", "tasks", "task_file", "eval_tasks"}  # options that select the items


@dataclass
class EvaluateOptions:
    """Options that only `evaluate` has."""

    _argument_group_name = "evaluation"

    split: str = option("test", "train, validation or test")
    batch_size: int = option(128, "items per batch", "per_device_eval_batch_size")
    data_seed: int | None = option(None, "seed of subsets and of split_validation_test; default: that of the run, or 0")
    load_experiment: str | None = option(
        None, "folder of a run, in the place of MODEL_DIR: its model or last checkpoint"
    )
    output_file: str | None = option(None, "also write the scores here, as JSON")

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")


def command(arguments: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Run the command on its tokens; returns the scores by task."""
    usage = "mpoe evaluate MODEL_DIR [--flag value ...]"
    asked = read_command(usage, __doc__, [EvaluateOptions, DataOptions], arguments, words=1)
    if asked is None:
        return None
    words, (options, data), flags = asked
    model_dir = _model_dir(words[0] if words else None, options.load_experiment)
    run = _settings_of_run(model_dir)
    data = _as_in_the_run(data, flags, run)
    from mpoe.cli.files import check_writable_file, write_json
    from mpoe.cli.pretrained import find, load_model, load_tokenizer
    from mpoe.cli.tasks import resolve
    from mpoe.models.table import ENCODER

    if options.output_file:
        check_writable_file("output_file", Path(options.output_file))
    source = find(model_dir)
    if source.style == ENCODER:
        raise CommandError(
            f"{model_dir} is an encoder ({source.model_type}); evaluate takes T5, GPT-2 and Llama models"
        )
    seed = _data_seed(run) if options.data_seed is None else options.data_seed
    described = None if "task_file" in flags else _descriptions_of_run(run)
    tasks = resolve(data.eval_tasks or data.tasks, data, source.style, seed, described)
    for task in tasks:
        task.examples(options.split)  # a missing split is refused before the model is loaded
    tokenizer, model = load_tokenizer(source), load_model(source)
    from mpoe.cli.scoring import evaluate_tasks, show_scores
    from mpoe.data.tasks import average_score

    found = evaluate_tasks(model, tokenizer, tasks, options.split, options.batch_size)
    scores = found.scores
    show_scores(found, f"{model_dir} on {options.split}")
    if options.output_file:
        report = {"model": model_dir, "split": options.split, "scores": scores, "mean": average_score(scores)}
        report |= {"baselines": found.baselines, "remarks": found.remarks}
        write_json(Path(options.output_file), report)
    return scores


def _settings_of_run(model_dir: str) -> dict[str, Any]:
    """The settings of the run in ``model_dir``, or of the run whose checkpoint it is; empty without one."""
    from mpoe.training.output_dir import RUN_FILE

    for folder in (Path(model_dir), Path(model_dir).resolve().parent):
        if (folder / RUN_FILE).is_file():
            try:
                return dict(json.loads((folder / RUN_FILE).read_text())["config"])
            except (ValueError, LookupError, TypeError) as error:
                raise CommandError(f"{folder / RUN_FILE} does not describe a run: {error}") from None
    return {}


def _as_in_the_run(data: DataOptions, flags: set[str], run: dict[str, Any]) -> DataOptions:
    """Set options without a flag as in training: lengths, columns, label words, and the items if no flag selects
    any."""
    kept = run.get("data", {})
    names = {f.name for f in fields(DataOptions) if f.name not in flags} & set(kept)
    if flags & SOURCES:
        names -= SOURCES
    taken = {name: kept[name] for name in sorted(names) if kept[name] != getattr(data, name)}
    if not taken:
        return data
    print("as in training: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    return replace(data, **taken)


def _descriptions_of_run(run: dict[str, Any]) -> dict[str, TaskSpec] | None:
    """The tasks of the run's ``task_file`` at that time; None if the run saved none."""
    from mpoe.data.spec import TaskSpec

    kept = run.get("described")
    try:
        return {name: TaskSpec.from_mapping(name, values) for name, values in kept.items()} if kept else None
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"described in run.json does not describe tasks: {error}") from None


def _data_seed(run: dict[str, Any]) -> int:
    """The seed that split the run's data; 0 without one.

    With another seed, split_validation_test would put items into the test split that the run used for validation.
    """
    training = run.get("training", {})
    seed = training.get("data_seed")
    return int(training.get("seed", 0) if seed is None else seed)


def _model_dir(given: str | None, load_experiment: str | None) -> str:
    if (given is None) == (load_experiment is None):
        raise CommandError("evaluate needs a model first: mpoe evaluate MODEL_DIR, or --load_experiment RUN_DIR")
    if given is not None:
        return given
    from mpoe.cli.experiment import model_of_experiment

    return model_of_experiment(str(load_experiment))
