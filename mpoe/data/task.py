"""What a task is: text in, text out, labels and metrics; smaller and safer splits of any task;
batches of several.

The registry of tasks is in :mod:`mpoe.data.tasks`."""

import dataclasses
import functools
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpoe.config.checks import check_choice, check_integer, check_type
from mpoe.data.metrics import METRICS, get_metric

SPLITS = ("train", "validation", "test")
KINDS = ("classification", "regression", "generation", "language_modeling")


@dataclass(frozen=True)
class Example:
    """One item. ``source``: the model's input (for language modelling: the whole text); ``target``:
    what it writes.

    ``number``: the exact number that a regression's target writes; ``messages``: for a
    conversation, (role, text) of every message, of which ``target`` is the last; ``ends``: of
    running text, False if the next item goes on with it.
    """

    source: str
    target: str = ""
    number: float | None = field(default=None, compare=False)
    messages: tuple[tuple[str, str], ...] = ()
    ends: bool = field(default=True, compare=False)


@dataclass(frozen=True)
class Task:
    """A text-to-text task.

    ``rows(split)`` yields rows of any type, ``to_text(row)`` makes an :class:`Example` of each
    (default: rows are Examples already). ``kind`` is classification (the target is one of
    ``labels``), regression (the target is a number written out), generation or language_modeling.
    The first of ``metrics`` is the one the task is judged by; all are fractions, larger is better,
    except perplexity. Lengths are in tokens.
    """

    name: str
    rows: Callable[[str], Iterable]
    to_text: Callable[[Any], Example] | None = None
    kind: str = "classification"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    max_source_length: int = 96
    max_target_length: int = 8

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name must be letters, digits, - and _; got {self.name!r}")
        check_choice(f"kind of task {self.name}", self.kind, KINDS)
        differ = len(set(self.labels)) == len(self.labels) > 1
        if self.kind == "classification" and not differ:
            raise ValueError(
                f"labels of task {self.name} must be at least two different words; got "
                f"{self.labels!r}"
            )
        allowed = [name for name, metric in METRICS.items() if metric.kind == self.kind]
        allowed = allowed or ["perplexity"]
        for metric in self.metrics:
            check_choice(f"metrics of the {self.kind} task {self.name}", metric, allowed)
        if not self.metrics:
            raise ValueError(
                f"metrics of task {self.name} must name at least one of {allowed}; got none"
            )
        for length in ("max_source_length", "max_target_length"):
            check_integer(f"{length} of task {self.name}", getattr(self, length), 1)

    def examples(self, split: str) -> tuple[Example, ...]:
        """Items of train, validation or test."""
        check_choice("split", split, SPLITS)
        rows = self.rows(split)
        examples = tuple(rows if self.to_text is None else map(self.to_text, rows))
        for row in examples:
            check_type("rows", row, Example, "Example, or to_text make them so")
        return examples

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

        A generated text that is no label counts as a wrong answer; one that is no number counts as
        0.
        """
        if self.kind == "language_modeling":
            raise ValueError(
                f"task {self.name} is language modelling: its perplexity is that of a model, not "
                "of texts"
            )
        indices = {label.lower(): index for index, label in enumerate(self.labels)}
        read: dict[str, Callable[[str], Any]] = {
            "classification": lambda text: indices.get(text.strip().lower(), -1),
            "regression": lambda text: float(text) if is_number(text) else 0.0,
            "generation": str,
        }
        first = list(map(read[self.kind], predictions))
        second = list(map(read[self.kind], references))
        if self.kind == "classification" and -1 in second:
            wrong = references[second.index(-1)]
            raise ValueError(
                f"references of task {self.name} must be labels {self.labels}; got {wrong!r}"
            )
        return {metric: get_metric(metric)(first, second) for metric in self.metrics}


def is_number(text: str) -> bool:
    """Whether ``text`` is a finite number."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def with_packages(task: Task) -> Task:
    """The task, if what its metrics need is there: before anything is trained, not when it is
    scored.

    Raises:
        RuntimeError: a metric needs a package of the extra ``metrics`` that is not installed.
    """
    for metric in task.metrics:
        if metric != "perplexity":
            get_metric(metric)
    return task


def with_subsets(
    task: Task,
    n_train: int | None = None,
    n_val: int | None = None,
    n_test: int | None = None,
    data_seed: int = 0,
) -> Task:
    """``task`` with at most the given number of items per split, drawn by ``data_seed``; None keeps
    a split whole.

    A smaller number with the same seed gives the beginning of a larger one, so growing a set never
    exchanges items.

    Raises:
        ValueError: a number below 1.
    """
    sizes = {"train": n_train, "validation": n_val, "test": n_test}
    for argument, size in zip(("n_train", "n_val", "n_test"), sizes.values(), strict=True):
        check_integer(argument, size, 1, optional=True)

    def rows(split: str) -> Sequence[Example]:
        items = list(task.examples(split))
        if sizes[split] is not None:
            random.Random(f"subset-{data_seed}").shuffle(items)
        return items[: sizes[split]]

    return dataclasses.replace(task, rows=rows, to_text=None)


def with_validation_test_split(task: Task, seed: int = 0) -> Task:
    """``task`` whose test items are taken out of its validation items, for data whose test labels
    are hidden (its own test split is not read).

    Half of the validation items are for the test, by ``seed``. Items with the same source text stay
    together, and one that training items have too is not in the test, where it would measure
    memorisation.

    Raises:
        ValueError: (on reading) fewer than two different validation items that are not among the
            training items.
    """

    @functools.cache
    def halves() -> tuple[Sequence[Example], Sequence[Example]]:
        known = set(map(_source, task.examples("train")))
        name = f"validation of task {task.name}, which split_validation_test divides,"
        return hold_out(task.examples("validation"), 0.5, seed, name, known)

    def rows(split: str) -> Sequence[Example]:
        return task.examples(split) if split == "train" else halves()[split == "test"]

    return dataclasses.replace(task, rows=rows, to_text=None)


def hold_out(
    items: Sequence[Example],
    share: float,
    seed: int,
    name: str,
    known: set[str] | None = None,
    most: int | None = None,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(the rest, a ``share`` of the different source texts, at most ``most``), by ``seed``.

    Items of one source text, ignoring case and blanks, stay together; those of the texts ``known``
    are in the rest.

    Raises:
        ValueError: fewer than two different items that are not ``known``; the message begins with
            ``name``.
    """
    from sklearn.model_selection import GroupShuffleSplit

    numbers: dict[str, int] = {}
    free = [index for index, item in enumerate(items) if _source(item) not in (known or ())]
    groups = [numbers.setdefault(_source(items[index]), len(numbers)) for index in free]
    if len(numbers) < 2:
        rest = " that are not in train" if known else ""
        raise ValueError(f"{name} must hold at least two different items{rest}; got {len(numbers)}")
    size = max(1, min(int(share * len(numbers)), most or len(numbers)))
    splitter = GroupShuffleSplit(1, test_size=size, random_state=seed)
    _, chosen = next(splitter.split(free, groups=groups))
    taken = {free[place] for place in chosen}
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, item in enumerate(items):
        parts[index in taken].append(item)
    return tuple(parts[0]), tuple(parts[1])


def _source(item: Example) -> str:
    return " ".join(item.source.lower().split())


# ------------------------------------------------------------------- several tasks


def multitask_batches(
    sizes: Mapping[str, int],
    batch_size: int,
    num_steps: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> np.ndarray:
    """The items of every optimizer step as indices into the concatenation of the tasks' items, in
    the order of ``sizes``: int64 [num_steps, batch_size].

    All items of a step come from one task (`datasets.interleave_datasets` draws a task per item);
    each task's items are visited in shuffled passes. Everything follows from the arguments: a run
    resumes with the rows from its step on, and rank r of R takes the columns ``[:, r::R]``.

    Args:
        sizes: items of each task.
        batch_size: items per optimizer step, of all ranks and micro-batches together.
        num_steps: number of optimizer steps.
        temperature: 1 draws tasks in proportion to their size, infinity draws all alike.
        seed: of tasks and items.

    Raises:
        ValueError: no task, a size or ``batch_size`` < 1, ``num_steps`` < 0, or a temperature that
            is not > 0.
    """
    if not sizes:
        raise ValueError("sizes must hold at least one task; got none")
    for name, size in sizes.items():
        check_integer(f"sizes[{name!r}]", size, 1)
    check_integer("batch_size", batch_size, 1)
    check_integer("num_steps", num_steps, 0)
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0; got {temperature}")
    # Relative to the largest size, so that no power overflows.
    relative = np.array([*sizes.values()], dtype=np.float64) / max(sizes.values())
    powers = relative ** (1.0 / temperature)
    draws = _generator(seed).choice(len(sizes), size=num_steps, p=powers / powers.sum())
    batches = np.empty((num_steps, batch_size), dtype=np.int64)
    first = 0
    for task, size in enumerate(sizes.values()):
        count = int((draws == task).sum())
        turns = range(math.ceil(count * batch_size / size))
        if turns:
            passes = [_generator(seed, task + 1, turn).permutation(size) for turn in turns]
            batches[draws == task] = first + np.resize(passes, (count, batch_size))
        first += size
    return batches


def _generator(*seed: int) -> np.random.Generator:
    """Random numbers by ``seed``, the same on every machine. Zeros at the end of ``seed`` change
    nothing."""
    return np.random.Generator(np.random.PCG64(seed))
