"""Smaller and safer splits of any task: subsets by seed, and a held-out test made from the validation items."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mpoe.data.task import Example, Task, subset


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
    groups = _groups(items, train, key or _source_key)
    if len(groups) < 2:
        raise ValueError(f"{name} must hold at least two different items that are not in train; got {len(groups)}")
    # At most half of the items, at least one group.
    return _part(items, groups, max(1, len(items) // 2), f"split-validation-test-{seed}")


def _groups(items: Sequence[Any], train: Iterable[Any], key: Callable[[Any], object]) -> list[list[int]]:
    """Positions of items of one key each, without the keys that occur in ``train``."""
    known = {key(item) for item in train}
    groups: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    return [group for name, group in groups.items() if name not in known]


def _part(
    items: Sequence[Any], groups: list[list[int]], wanted: int, seed: str
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(the rest, about ``wanted`` items): whole groups drawn by ``seed``, at least one, but not all."""
    random.Random(seed).shuffle(groups)
    taken: set[int] = set()
    for group in groups[:-1]:
        if not taken or len(taken) + len(group) <= wanted:
            taken.update(group)
    return (
        tuple(item for index, item in enumerate(items) if index not in taken),
        tuple(items[index] for index in sorted(taken)),
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
    source text stay together. The choice is the same for every seed, so training never sees an item that a later
    evaluation uses.

    Raises:
        ValueError: (on reading) fewer than two different training items.
    """

    @functools.cache
    def parts() -> dict[str, Sequence[Example]]:
        items = task.examples("train")
        if not needed():
            return {"train": items}
        groups = _groups(items, (), _source_key)
        if len(groups) < 2:
            raise ValueError(f"train of task {task.name} must hold two different items at least; got {len(groups)}")
        train, validation = _part(items, groups, max(1, min(1000, len(items) // 10)), "validation-from-train")
        return {"train": train, "validation": validation}

    def rows(split: str) -> Sequence[Example]:
        if split == "test":
            return task.examples("test")
        return parts().get(split) or task.examples(split)

    return dataclasses.replace(task, rows=rows, to_text=None)


def with_subsets(
    task: Task, n_train: int | None = None, n_val: int | None = None, n_test: int | None = None, data_seed: int = 0
) -> Task:
    """``task`` with at most the given number of items per split, drawn by ``data_seed``; None keeps a split whole.

    Raises:
        ValueError: a number below 1.
    """
    sizes = {"train": n_train, "validation": n_val, "test": n_test}
    for argument, size in (("n_train", n_train), ("n_val", n_val), ("n_test", n_test)):
        if size is not None and size < 1:
            raise ValueError(f"{argument} must be >= 1 or unset; got {size}")

    def rows(split: str) -> Sequence[Example]:
        return subset(task.examples(split), sizes[split], data_seed)

    return dataclasses.replace(task, rows=rows, to_text=None)


def _source_key(item: Any) -> object:
    return " ".join(item.source.lower().split()) if isinstance(item, Example) else item
