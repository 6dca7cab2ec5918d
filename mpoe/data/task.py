"""What a task is: text in, text out, labels and metrics. The registry of tasks is in :mod:`mpoe.data.tasks`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpoe.data.documentation import check_split
from mpoe.data.mappings import lookup
from mpoe.data.metrics import METRICS, get_metric

KINDS = ("classification", "regression", "generation", "language_modeling")


@dataclass(frozen=True)
class Example:
    """One item. ``source``: the model's input (for language modelling: the whole text); ``target``: what it writes.

    ``number``: the exact number that a regression's target writes; ``messages``: for a conversation, (role, text) of
    every message, of which ``target`` is the last.
    """

    source: str
    target: str = ""
    number: float | None = field(default=None, compare=False)
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Task:
    """A text-to-text task.

    ``rows(split)`` yields rows of any type, ``to_text(row)`` makes an :class:`Example` of each (default: rows are
    Examples already). ``kind`` is classification (the target is one of ``labels``), regression (the target is a
    number written out), generation or language_modeling. The first of ``metrics`` is the one the task is judged by;
    all are fractions, larger is better, except perplexity. Lengths are in tokens.
    """

    name: str
    rows: Callable[[str], Iterable[Any]]
    to_text: Callable[[Any], Example] | None = None
    kind: str = "classification"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    max_source_length: int = 96
    max_target_length: int = 8
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name must be letters, digits, - and _; got {self.name!r}")
        if self.kind not in KINDS:
            raise ValueError(f"kind of task {self.name} must be one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.kind == "classification" and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels of task {self.name} must be at least two different words; got {self.labels!r}")
        allowed = {name for name, metric in METRICS.items() if metric.kind == self.kind} or {"perplexity"}
        for metric in self.metrics:
            lookup({**METRICS, "perplexity": None}, metric, "metric")
            if metric not in allowed:
                raise ValueError(
                    f"metrics of a {self.kind} task must be among {sorted(allowed)}; got {metric!r} for {self.name}"
                )
        if not self.metrics:
            raise ValueError(f"metrics of task {self.name} must name at least one of {sorted(allowed)}; got none")
        for length in ("max_source_length", "max_target_length"):
            if getattr(self, length) < 1:
                raise ValueError(f"{length} of task {self.name} must be >= 1; got {getattr(self, length)}")

    @property
    def main_metric(self) -> str:
        """The metric this task is judged by."""
        return self.metrics[0]

    def examples(self, split: str, n: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """Items of train, validation or test; with ``n``, a random subset of that many (all if there are fewer)."""
        check_split(split)
        rows = tuple(row if self.to_text is None else self.to_text(row) for row in self.rows(split))
        odd = next((row for row in rows if not isinstance(row, Example)), None)
        if odd is not None:
            raise TypeError(f"rows must be Example, or to_text make them so; got {type(odd).__name__}")
        return subset(rows, n, seed)

    def train(self) -> tuple[Example, ...]:
        """Training items."""
        return self.examples("train")

    def validation(self) -> tuple[Example, ...]:
        """Validation items, for choosing settings and checkpoints."""
        return self.examples("validation")

    def test(self) -> tuple[Example, ...]:
        """Held-out items, for the final number only."""
        return self.examples("test")

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Every metric of the task on generated texts and target texts, both [N].

        A generated text that is no label counts as a wrong answer; one that is no number counts as 0.
        """
        if self.kind == "language_modeling":
            raise ValueError(f"task {self.name} is language modelling: use perplexity(losses) instead of score(texts)")
        first: Sequence[Any] = predictions
        second: Sequence[Any] = references
        if self.kind == "classification":
            first = [self.label_index(text) for text in predictions]
            second = [self.label_index(text) for text in references]
            if -1 in second:
                wrong = references[second.index(-1)]
                raise ValueError(f"references of task {self.name} must be labels {self.labels}; got {wrong!r}")
        elif self.kind == "regression":
            first = [_number(text) for text in predictions]
            second = [_number(text) for text in references]
        return {metric: get_metric(metric)(first, second) for metric in self.metrics}

    def label_index(self, text: str) -> int:
        """Index of the label written as ``text`` (case and outer blanks aside); -1 if it is none."""
        cleaned = text.strip().lower()
        return next((i for i, label in enumerate(self.labels) if label.lower() == cleaned), -1)


def subset(items: Sequence, n: int | None, seed: int = 0) -> tuple:
    """``n`` items drawn without replacement, in random order, by ``seed`` alone; all, in order, if n is None.

    A smaller n with the same seed gives the beginning of a larger one, so growing a set never exchanges items.

    Raises:
        ValueError: n < 0.
    """
    if n is None:
        return tuple(items)
    if n < 0:
        raise ValueError(f"n must be >= 0 or None; got {n}")
    order = list(range(len(items)))
    random.Random(f"subset-{seed}").shuffle(order)
    return tuple(items[i] for i in order[:n])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
