"""The registry of tasks, which users extend with a few lines.

A new task::

    register_task(Task(
        name="greeting",
        rows=lambda split: [{"text": "good morning", "label": 1}],
        to_text=lambda row: Example(f"is it a greeting: {row['text']}", "yes" if row["label"] else "no"),
        labels=("no", "yes"),
        metrics=("accuracy",),
    ))
"""

from __future__ import annotations

from collections.abc import Mapping

from mpoe.data.doc_tasks import EMBEDDED_TASKS
from mpoe.data.names import lookup
from mpoe.data.task import Example, Task, subset

__all__ = ["Example", "Task", "average_score", "get_task", "register_task", "subset", "task_names"]

_TASKS: dict[str, Task] = {task.name: task for task in EMBEDDED_TASKS}


def register_task(task: Task, replace: bool = False) -> Task:
    """Make ``task`` known by its name.

    Raises:
        ValueError: the name is taken and ``replace`` is False.
    """
    if not isinstance(task, Task):
        raise TypeError(f"task must be a Task; got {type(task).__name__}")
    if task.name in _TASKS and not replace:
        raise ValueError(f"a task named {task.name!r} is registered already; pass replace=True to exchange it")
    _TASKS[task.name] = task
    return task


def get_task(name: str) -> Task:
    """The task called ``name``; ValueError with the close matches otherwise."""
    return lookup(_TASKS, name, "task")


def task_names() -> tuple[str, ...]:
    """Names of all known tasks, sorted."""
    return tuple(sorted(_TASKS))


def average_score(scores: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks (not over metrics) of the first metric in each task's scores."""
    if not scores:
        raise ValueError("scores must hold at least one task; got none")
    return sum(next(iter(metrics.values())) for metrics in scores.values()) / len(scores)
