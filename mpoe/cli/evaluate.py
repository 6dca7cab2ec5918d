"""`mpoe evaluate MODEL_DIR`: scores of a saved model on a split.

For a run, settings without an option are as in training.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mpoe.cli import pretrained
from mpoe.cli.errors import CommandError
from mpoe.cli.files import check_writable_file, write_json
from mpoe.cli.parsing import Asked, as_command, option
from mpoe.cli.runs import data_of_run, model_of_experiment
from mpoe.cli.scoring import evaluate_tasks, show_scores
from mpoe.cli.tasks import DataOptions, resolve
from mpoe.models.table import ENCODER


@dataclass
class EvaluateOptions:
    """Options that only `evaluate` has."""

    split: str = option("test", "train, validation or test")
    batch_size: int = option(128, "items per batch", "per_device_eval_batch_size")
    data_seed: int | None = option(None, "seed of subsets and of split_validation_test; default: that of the run, or 0")
    load_experiment: str | None = option(
        None, "folder of a run, in the place of MODEL_DIR: its model or last checkpoint"
    )
    output_file: str | None = option(None, "also write the scores here, as JSON")

    LEAST: ClassVar[dict[str, int]] = {"batch_size": 1}


@as_command("mpoe evaluate MODEL_DIR [--flag value ...]", EvaluateOptions, DataOptions, words=(0, 1))
def command(asked: Asked) -> dict[str, dict[str, float]]:
    """Print and return the scores by task."""
    (options, data), words = asked.options, asked.words
    if bool(words) == (options.load_experiment is not None):
        raise CommandError("evaluate needs a model first: mpoe evaluate MODEL_DIR, or --load_experiment RUN_DIR")
    folder = words[0] if words else model_of_experiment(options.load_experiment)
    data, seed, described = data_of_run(folder, data, asked.given)
    if options.output_file:
        check_writable_file("output_file", Path(options.output_file))
    source = pretrained.find(folder)
    if source.style == ENCODER and not source.is_classifier:
        raise CommandError(f"{folder} is an encoder ({source.model_type}) without a head for labels (mpoe train)")
    seed = seed if options.data_seed is None else options.data_seed
    tasks = resolve(data.eval_tasks or data.tasks, data, source.style, seed, described)
    for task in tasks:
        task.examples(options.split)  # a missing split is refused before the model is loaded
    tokenizer, model = pretrained.load_tokenizer(source), pretrained.load_model(source)
    found = evaluate_tasks(model, tokenizer, tasks, options.split, options.batch_size)
    show_scores(found, f"{folder} on {options.split}")
    if options.output_file:
        write_json(Path(options.output_file), {"model": folder, "split": options.split, **found})
    return found["scores"]
