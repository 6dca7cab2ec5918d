"""What a task is: text in, text out, labels and metrics; and smaller and safer splits of any task.

The registry of tasks is in :mod:`mpoe.data.tasks`."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpoe.config.checks import check_choice, check_integer
from mpoe.data.mappings import lookup
from mpoe.data.metrics import METRICS, get_metric

SPLITS = ("train", "validation", "test")
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
        check_choice(f"kind of task {self.name}", self.kind, KINDS)
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
            check_integer(f"{length} of task {self.name}", getattr(self, length), 1)

    @property
    def main_metric(self) -> str:
        """The metric this task is judged by."""
        return self.metrics[0]

    def examples(self, split: str, n: int | None = None, seed: int = 0) -> tuple[Example, ...]:
        """Items of train, validation or test; with ``n``, a random subset of that many (all if there are fewer)."""
        check_choice("split", split, SPLITS)
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
    check_integer("n", n, 0)
    order = list(range(len(items)))
    random.Random(f"subset-{seed}").shuffle(order)
    return tuple(items[i] for i in order[:n])


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0


def split_validation_test(
    items: Sequence[Any],
    seed: int = 0,
    train: Iterable[Any] = (),
    key: Callable[[Any], object] | None = None,
    name: str = "items",
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Two disjoint halves of ``items``: (validation, test), for data whose test labels are hidden.

    Items with the same ``key`` (default: the source text, ignoring case and blanks) stay in the same half, and an item
    whose key occurs in ``train`` is left out of the test half, where it would measure memorisation. Depends only on
    ``seed``. ``name``: the items' name in error messages.

    Raises:
        ValueError: fewer than two different items that are not in ``train``.
    """
    key = key or _source_key
    known = {key(item) for item in train}
    return _divide(items, [key(item) for item in items], known, 0.5, None, seed, name)


def _divide(
    items: Sequence[Any],
    keys: Sequence[object],
    known: set[object],
    share: float,
    most: int | None,
    seed: int,
    name: str,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(the rest, a share of the keys' items, of at most ``most`` keys): all items of a key go together, those of
    ``known`` to the rest."""
    from sklearn.model_selection import GroupShuffleSplit

    numbers: dict[object, int] = {}
    free = [index for index, key in enumerate(keys) if key not in known]
    groups = [numbers.setdefault(keys[index], len(numbers)) for index in free]
    if len(numbers) < 2:
        rest = " that are not in train" if known else ""
        raise ValueError(f"{name} must hold at least two different items{rest}; got {len(numbers)}")
    size = max(1, min(int(share * len(numbers)), most or len(numbers)))
    _, chosen = next(GroupShuffleSplit(1, test_size=size, random_state=seed).split(free, groups=groups))
    taken = {free[place] for place in chosen}
    return (
        tuple(item for index, item in enumerate(items) if index not in taken),
        tuple(item for index, item in enumerate(items) if index in taken),
    )


def with_validation_test_split(task: Task, seed: int = 0) -> Task:
    """``task`` whose test items are taken out of its validation items (its own test split is not read)."""

    def rows(split: str) -> Sequence[Example]:
        train = task.examples("train")
        if split == "train":
            return train
        name = f"validation of task {task.name}, which split_validation_test divides,"
        validation, test = split_validation_test(task.examples("validation"), seed, train, name=name)
        return validation if split == "validation" else test

    return dataclasses.replace(task, rows=rows, to_text=None)


def with_validation_from_train(task: Task, needed: Callable[[], bool] = lambda: True) -> Task:
    """``task`` whose validation items are taken out of its training items: a tenth of them, at most a thousand.

    For data without a validation split; ``needed`` decides this when an item is first requested. Items with the same
    source text count once and stay together. The choice is the same for every seed, so training never sees an item
    that a later evaluation uses.

    Raises:
        ValueError: (on reading) fewer than two different training items.
    """

    @functools.cache
    def parts() -> dict[str, Sequence[Example]]:
        items = task.examples("train")
        if not needed():
            return {"train": items}
        keys = [_source_key(item) for item in items]
        train, validation = _divide(items, keys, set(), 0.1, 1000, 0, f"train of task {task.name}")
        return {"train": train, "validation": validation}

    def rows(split: str) -> Sequence[Example]:
        return (parts().get(split) if split != "test" else None) or task.examples(split)

    return dataclasses.replace(task, rows=rows, to_text=None)


def with_subsets(
    task: Task, n_train: int | None = None, n_val: int | None = None, n_test: int | None = None, data_seed: int = 0
) -> Task:
    """``task`` with at most the given number of items per split, drawn by ``data_seed``; None keeps a split whole.

    Raises:
        ValueError: a number below 1.
    """
    for argument, size in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
        check_integer(argument, size, 1, optional=True)
    sizes = {"train": n_train, "validation": n_val, "test": n_test}
    return dataclasses.replace(
        task, rows=lambda split: subset(task.examples(split), sizes[split], data_seed), to_text=None
    )


def _source_key(item: Any) -> object:
    return " ".join(item.source.lower().split()) if isinstance(item, Example) else item
