"""Smaller and safer splits of any task: subsets by seed, and a held-out test made from the validation items."""

from __future__ import annotations

import dataclasses
import functools
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
        if size is not None and size < 1:
            raise ValueError(f"{argument} must be >= 1 or unset; got {size}")
    sizes = {"train": n_train, "validation": n_val, "test": n_test}
    return dataclasses.replace(
        task, rows=lambda split: subset(task.examples(split), sizes[split], data_seed), to_text=None
    )


def _source_key(item: Any) -> object:
    return " ".join(item.source.lower().split()) if isinstance(item, Example) else item
