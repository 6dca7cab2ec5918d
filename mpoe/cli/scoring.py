"""From tasks to token ids, and from teacher-forced items to loss and expert load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpoe.data.task import Task

Items = Sequence[dict[str, list[int]]]


def encode_task(task: Task, split: str, tokenizer: Any, limit: int | None = None) -> list[dict[str, Any]]:
    """A task's items as token ids; for language modelling blocks of ``max_source_length`` tokens."""
    from mpoe.data.encode import encode_language_modeling, encode_text_to_text

    examples = task.examples(split)
    if task.kind == "language_modeling":
        return encode_language_modeling(examples, tokenizer, task.max_source_length)[:limit]
    return encode_text_to_text(examples[:limit], tokenizer, task.max_source_length, task.max_target_length)


def expert_load(model: Any, items: Items, pad_token_id: int, batch_size: int = 64) -> list[list[int]]:
    """Tokens per expert on teacher-forced items, [layers][E]; empty for a dense model. Padding is not counted."""
    import torch

    from mpoe.data.collate import PaddingCollator
    from mpoe.data.predict import evaluation_mode

    collate = PaddingCollator(pad_token_id)
    load: torch.Tensor | None = None
    with torch.inference_mode(), evaluation_mode(model):
        for start in range(0, len(items), batch_size):
            batch = {k: v.to(model.device) for k, v in collate(items[start : start + batch_size]).items()}
            part = getattr(model(**batch), "expert_load", None)
            if part is None:
                return []
            load = part.clone() if load is None else load + part
    return [] if load is None else load.tolist()


def evaluate_tasks(
    model: Any, tokenizer: Any, tasks: Sequence[Task], split: str, batch_size: int = 128
) -> dict[str, dict[str, float]]:
    """Scores of every task by name; the first entry of each is the metric it is judged by. ``items`` come last."""
    from mpoe.data.predict import evaluate_task

    scores = {}
    for task in tasks:
        score = evaluate_task(model, tokenizer, task, split, batch_size=batch_size)
        scores[task.name] = {**score, "items": len(task.examples(split))}
    return scores


SCORE_HEADER = ("task", "metric", "value", "items")


def score_rows(scores: dict[str, dict[str, float]]) -> list[tuple[str, str, str, str]]:
    """The scores of `evaluate_tasks` as rows, the average over tasks last where there are several."""
    from mpoe.data.tasks import average_score

    rows = [
        (task, name, f"{value:.4f}", str(values["items"]))
        for task, values in scores.items()
        for name, value in values.items()
        if name != "items"
    ]
    if len(scores) > 1:
        total = sum(int(values["items"]) for values in scores.values())
        rows.append(("average over tasks", "first of each", f"{average_score(scores):.4f}", str(total)))
    return rows


def show_scores(scores: dict[str, dict[str, float]], title: str) -> None:
    """Print the scores of `evaluate_tasks` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*SCORE_HEADER, title=title)
    for row in score_rows(scores):
        table.add_row(*row)
    Console().print(table)
