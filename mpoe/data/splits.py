"""Smaller and safer splits of any task: subsets by seed, and a held-out test made from the validation items."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mpoe.data.task import Example, Task, subset


def split_validation_test(
    items: Sequence[Any],
    seed: int = 0,
    train: Iterable[Any] = (),
    key: Callable[[Any], object] | None = None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Two disjoint halves of ``items``: (validation, test), for data whose test labels are hidden.

    Items with the same ``key`` (default: the source text, case and blanks aside) never part company, and an item
    whose key occurs in ``train`` is left out of the test half: a copy would measure memory. Depends on ``seed`` alone.

    Raises:
        ValueError: fewer than two different items that are not in ``train``.
    """
    key = key or _source_key
    known = {key(item) for item in train}
    groups: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(key(item), []).append(index)
    fresh = [group for name, group in groups.items() if name not in known]
    if len(fresh) < 2:
        raise ValueError(f"items must hold at least two different items that are not in train; got {len(fresh)}")
    random.Random(f"split-validation-test-{seed}").shuffle(fresh)
    # At most half of what there is, one group at least.
    wanted = max(1, len(items) // 2)
    test: list[int] = []
    for group in fresh[:-1]:
        if not test or len(test) + len(group) <= wanted:
            test += group
    chosen = set(test)
    return (
        tuple(item for index, item in enumerate(items) if index not in chosen),
        tuple(items[index] for index in sorted(chosen)),
    )


def with_validation_test_split(task: Task, seed: int = 0) -> Task:
    """``task`` whose test items are taken out of its validation items (its own test split is not read)."""

    def rows(split: str) -> Sequence[Example]:
        train = task.examples("train")
        if split == "train":
            return train
        validation, test = split_validation_test(task.examples("validation"), seed, train)
        return validation if split == "validation" else test

    return dataclasses.replace(task, rows=rows, to_text=None)


def with_subsets(
    task: Task, n_train: int | None = None, n_val: int | None = None, n_test: int | None = None, data_seed: int = 0
) -> Task:
    """``task`` with at most so many items per split, drawn by ``data_seed``; None keeps a split whole.

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
