"""Rows of a described task from the Hugging Face hub, through the ``datasets`` package (the extra ``hub``)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mpoe.data.files import Row
from mpoe.data.local import detect_spec
from mpoe.data.spec import HubData, TaskSpec
from mpoe.data.splits import with_validation_from_train
from mpoe.data.task import Example, Task


def load_hub_task(spec: TaskSpec) -> Task:
    """The task on the hub; nothing is read before an item is asked for.

    Raises:
        ValueError: (on reading) ``datasets`` is not installed, the data set cannot be loaded, no such split, or an
            invalid row.
    """
    hub = spec.hub_data
    if hub is None:
        raise ValueError(f"hub of task {spec.name} must name a data set; got nothing")

    def splits() -> Mapping[str, Any]:
        return _load(spec.name, hub)

    @functools.cache
    def rows(split: str) -> tuple[Example, ...]:
        theirs = hub.splits.get(split, split)
        if split == "test" and spec.hidden_test:
            raise ValueError(f"the test labels of task {spec.name} are not public; use split_validation_test")
        if theirs not in splits():
            raise ValueError(f"hub data set {hub.path} of task {spec.name} has no {theirs} split; got {list(splits())}")
        data = splits()[theirs]
        return spec.examples((row, f"{hub.path}, {theirs}, row {index}") for index, row in enumerate(data))

    task = Task(**spec.task_fields(), rows=rows)
    return with_validation_from_train(task, lambda: hub.splits.get("validation", "validation") not in splits())


def detect_hub_task(path: str, name: str, **detection: Any) -> Task:
    """The task of a data set without a description, called ``name``: columns and labels are detected from the train
    split, with the options of :func:`mpoe.data.local.detect_spec`.

    Raises:
        ValueError: as :func:`load_hub_task`, and without a train split or a label or text column.
    """
    hub = HubData(path)
    splits = _load(name, hub)
    if "train" not in splits:
        raise ValueError(f"hub data set {path} must have a train split; got {list(splits)}")
    rows = [Row(dict(row), number) for number, row in enumerate(splits["train"])]
    return load_hub_task(dataclasses.replace(detect_spec(path, rows, name, **detection), hub=hub))


@functools.lru_cache(maxsize=16)
def _load(task: str, hub: HubData) -> Mapping[str, Any]:
    """Every split of a data set."""
    local = f"give data_dir, a folder that holds a folder {task} of local files"
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"task {task} is on the hub ({hub.path}), which needs the package datasets: pip install 'mpoe[hub]'; "
            f"or {local}"
        ) from None
    try:
        return load_dataset(hub.path, hub.config, data_dir=hub.folder, revision=hub.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"task {task}: the hub did not give {hub.path} ({reason}); {local}") from error
