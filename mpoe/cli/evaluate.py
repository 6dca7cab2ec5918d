"""`mpoe evaluate MODEL_DIR`: scores of a saved model on a split.

For a run, settings without an option are as in training.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpoe.cli import models
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.outputs import check_writable_file, write_json
from mpoe.cli.report import Table
from mpoe.cli.tasks import DataOptions, data_of_run, model_of_experiment, resolve
from mpoe.data.encode import (
    Item,
    as_batches,
    encode_labels,
    encode_language_modeling,
    encode_responses,
    encode_text_to_text,
)
from mpoe.data.metrics import average_score
from mpoe.data.predict import evaluate_task, evaluation_mode
from mpoe.data.task import Task
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ

AT_ONCE = 64  # items of a batch whose expert load is counted, at most
LOGITS = 1 << 25  # numbers of a batch's logits, at most: 128 MiB in float32
Scores = Mapping[str, Mapping[str, float]]  # by task and metric


def encode_task(
    task: Task,
    split: str,
    tokenizer: Any,
    limit: int | None = None,
    style: str = SEQ2SEQ,
    labels: Sequence[str] = (),
) -> list[Item]:
    """A task's items as token ids for a model of this ``style``; for language modelling blocks of
    ``max_source_length`` tokens. ``labels``: what an encoder's head tells apart, in its order."""
    examples = task.examples(split)
    if task.kind == "language_modeling":
        return encode_language_modeling(examples, tokenizer, task.max_source_length)[:limit]
    if style == ENCODER:
        return encode_labels(examples[:limit], tokenizer, labels, task.max_source_length)
    encode = encode_responses if style == CAUSAL else encode_text_to_text
    return encode(examples[:limit], tokenizer, task.max_source_length, task.max_target_length)


def padded_batches(model: Any, items: Sequence[Item], tokenizer: Any) -> list[Item]:
    """Batches of items, so large that a forward pass's logits stay within `LOGITS` numbers."""
    longest = max((len(item["input_ids"]) for item in items), default=1)
    at_once = max(1, min(AT_ONCE, LOGITS // (longest * model.config.vocab_size)))
    return list(as_batches(items, tokenizer, at_once))


def expert_load(model: Any, items: Sequence[Item], tokenizer: Any) -> list[list[int]]:
    """Tokens per expert on teacher-forced items, [layers][E]; empty for a dense model. Padding is
    not counted."""
    parts = []
    with torch.inference_mode(), evaluation_mode(model):
        for batch in padded_batches(model, items, tokenizer):
            # encoders have no labels
            given = {n: value.to(model.device) for n, value in batch.items() if value is not None}
            output = model(**given)
            if getattr(output, "expert_load", None) is None:
                return []
            parts.append(output.expert_load)
    return torch.stack(parts).sum(0).tolist() if parts else []


SCORE_NOTE = (
    "constant: one answer for all items, the most frequent one or the mean; of perplexity, every "
    "token guessed by its frequency. Perplexity and loss (in nats) are per token of the model's "
    "tokenizer: those of two tokenizers do not compare."
)
_LOWER_IS_BETTER = ("perplexity", "loss")


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[Task], split: str, batch_size: int = 128
) -> dict:
    """Scores of every task by name, as results hold them.

    Returns:
        ``scores``: by task; the first entry of each is the metric it is judged by, and ``items``
            come last. ``mean``:
        of the first metric of each, over tasks. ``constant``: by task, the metrics of an answer
            that ignores the input
        (`mpoe.data.predict.constant_scores`). ``remarks``: comments on the numbers, one sentence
            each.
    """
    scores = {}
    constants = {}
    remarks = []
    for task in tasks:
        result = evaluate_task(model, tokenizer, task, split, batch_size)
        scores[task.name] = {**result.scores, "items": len(task.examples(split))}
        constants[task.name] = result.constant
        metric = task.metrics[0]
        value = result.scores[metric]
        constant = result.constant[metric]
        if result.collapse:
            remarks.append(f"{task.name}: {result.collapse}")
        elif value >= constant if metric in _LOWER_IS_BETTER else value <= constant:
            remarks.append(
                f"{task.name}: {metric} {value:.4g} is not better than the constant answer's "
                f"{constant:.4g}"
            )
    return {
        "scores": scores,
        "mean": average_score(scores),
        "constant": constants,
        "remarks": remarks,
    }


def metrics_of(columns: Iterable[Scores]) -> list[tuple[str, str]]:
    """(task, metric) of all scores, in order."""
    pairs = (
        (task, metric) for scores in columns for task, values in scores.items() for metric in values
    )
    return [pair for pair in dict.fromkeys(pairs) if pair[1] != "items"]


def score_table(
    columns: Mapping[str, Scores], constants: Scores, title: str, words: str = SCORE_NOTE
) -> Table:
    """Scores side by side, the best of a row marked, constant answers' last; below, the average
    over several tasks."""
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for task, metric in metrics_of(columns.values()):
        values = [scores.get(task, {}).get(metric) for scores in (*columns.values(), constants)]
        there = [value for value in values[:-1] if value is not None]
        if min(there) < max(there):
            winner = (min if metric in _LOWER_IS_BETTER else max)(there)
            places = range(1, len(values))
            best |= {(len(rows), place) for place in places if values[place - 1] == winner}
        rows.append([f"{task}: {metric}", *map(_shown, values)])
    if len(constants) > 1:
        means = [
            average_score(scores) if scores else None for scores in (*columns.values(), constants)
        ]
        rows.append(["average over tasks, of the first of each", *map(_shown, means)])
    return Table(["", *columns, "constant"], rows, title, words, best=best)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def show_scores(evaluated: Mapping, title: str) -> None:
    """Print what `evaluate_tasks` returned."""
    items = ", ".join(
        f"{score['items']:,} of {task}" for task, score in evaluated["scores"].items()
    )
    columns = {"value": evaluated["scores"]}
    words = f"Items: {items}. {SCORE_NOTE}"
    score_table(columns, evaluated["constant"], title, words).show()
    for remark in evaluated["remarks"]:
        print(f"note: {remark}")


@dataclass
class EvaluateOptions:
    """Options that only `evaluate` has."""

    split: str = option("test", "train, validation or test")
    batch_size: int = option(128, "items per batch", "per_device_eval_batch_size")
    data_seed: int | None = option(
        None, "of subsets and of split_validation_test; default: the run's data_seed, or 0"
    )
    load_experiment: str | None = option(
        None, "folder of a run, for MODEL_DIR: its model or last checkpoint"
    )
    output_file: str | None = option(None, "also write the scores here, as JSON")

    LEAST = (("batch_size", 1),)


@as_command(EvaluateOptions, DataOptions, words=(0, 1))
def command(request: Request) -> dict[str, dict[str, float]]:
    """Print and return the scores by task."""
    (options, data), words = request.options, request.words
    if bool(words) == (options.load_experiment is not None):
        raise CommandError(
            "evaluate needs a model first: mpoe evaluate MODEL_DIR, or --load_experiment RUN_DIR"
        )
    folder = words[0] if words else model_of_experiment(options.load_experiment)
    data, seed, described = data_of_run(folder, data, request.given)
    if options.output_file:
        check_writable_file("output_file", Path(options.output_file))
    source = models.find(folder)
    if source.style == ENCODER and not source.is_classifier:
        raise CommandError(
            f"{folder} is an encoder ({source.model_type}) without a head for labels (mpoe train)"
        )
    seed = seed if options.data_seed is None else options.data_seed
    tasks = resolve(data.eval_tasks or data.tasks, data, source.style, seed, described)
    for task in tasks:
        task.examples(options.split)  # a missing split is refused before the model is loaded
    tokenizer = models.load_tokenizer(source)
    model = models.load_model(source)
    evaluated = evaluate_tasks(model, tokenizer, tasks, options.split, options.batch_size)
    show_scores(evaluated, f"{folder} on {options.split}")
    if options.output_file:
        written = {"model": folder, "split": options.split, **evaluated}
        write_json(Path(options.output_file), written)
    return evaluated["scores"]
