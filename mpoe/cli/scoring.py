"""From tasks to token ids, and from teacher-forced items to loss and expert load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ

if TYPE_CHECKING:
    from mpoe.cli.report import Table
    from mpoe.data.task import Task

Items = Sequence[dict[str, list[int]]]


def encode_task(
    task: Task,
    split: str,
    tokenizer: Any,
    limit: int | None = None,
    style: str = SEQ2SEQ,
    labels: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """A task's items as token ids for a model of this ``style``; for language modelling blocks of
    ``max_source_length`` tokens. ``labels``: what an encoder's head tells apart, in its order."""
    from mpoe.data.encode import encode_labels, encode_language_modeling, encode_responses, encode_text_to_text

    examples = task.examples(split)
    if task.kind == "language_modeling":
        return encode_language_modeling(examples, tokenizer, task.max_source_length)[:limit]
    if style == ENCODER:
        return encode_labels(examples[:limit], tokenizer, labels, task.max_source_length)
    encode = encode_responses if style == CAUSAL else encode_text_to_text
    return encode(examples[:limit], tokenizer, task.max_source_length, task.max_target_length)


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


SCORE_HEADER = ("task", "metric", "value", "baseline", "items")
SCORE_NOTE = (
    "baseline: one answer for all items, the most frequent one or the mean; of perplexity, every token guessed by its "
    "frequency. Perplexity and loss are per token of the model's tokenizer: those of two tokenizers do not compare."
)
_LABELS = {"perplexity": "perplexity per token", "loss": "loss, nats per token"}


@dataclass(frozen=True)
class TaskScores:
    """Scores of several tasks.

    Attributes:
        scores: by task; the first entry of each is the metric it is judged by, and ``items`` come last.
        baselines: by task, the metrics of an answer that ignores the input (`mpoe.data.predict.baseline_scores`).
        remarks: comments on the numbers, one sentence each.
    """

    scores: dict[str, dict[str, float]]
    baselines: dict[str, dict[str, float]]
    remarks: list[str]

    @property
    def mean(self) -> float:
        """Over tasks, of the first metric of each."""
        from mpoe.data.tasks import average_score

        return average_score(self.scores)

    def table(self, title: str) -> Table:
        """The scores as a table; with several tasks, their average comes last."""
        from mpoe.cli.report import Table
        from mpoe.data.tasks import average_score

        rows = []
        for task, values in self.scores.items():
            for name, value in values.items():
                baseline = self.baselines[task].get(name)
                shown = "-" if baseline is None else f"{baseline:.4f}"
                if name != "items":
                    rows.append((task, _LABELS.get(name, name), f"{value:.4f}", shown, str(values["items"])))
        if len(self.scores) > 1:
            total = sum(int(values["items"]) for values in self.scores.values())
            constant = f"{average_score(self.baselines):.4f}"
            rows.append(("average over tasks", "first of each", f"{self.mean:.4f}", constant, str(total)))
        return Table(SCORE_HEADER, rows, title, SCORE_NOTE)

    def show(self, title: str) -> None:
        """Print the table, and the remarks."""
        self.table(title).show()
        for remark in self.remarks:
            print(f"note: {remark}")


def evaluate_tasks(model: Any, tokenizer: Any, tasks: Sequence[Task], split: str, batch_size: int = 128) -> TaskScores:
    """Scores of every task by name, with their baselines."""
    from mpoe.data.predict import evaluate_beside_baseline

    results = TaskScores({}, {}, [])
    for task in tasks:
        found = evaluate_beside_baseline(model, tokenizer, task, split, batch_size=batch_size)
        results.scores[task.name] = {**found.scores, "items": len(task.examples(split))}
        results.baselines[task.name] = found.baseline
        metric = task.main_metric
        value, constant = found.scores[metric], found.baseline[metric]
        if found.collapse:
            results.remarks.append(f"{task.name}: {found.collapse}")
        elif value >= constant if metric == "perplexity" else value <= constant:
            results.remarks.append(
                f"{task.name}: {metric} {value:.4g} is not better than the baseline's {constant:.4g}"
            )
    return results
