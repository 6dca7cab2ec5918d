"""Multi-task sampling: one task per optimizer step, p ~ size^(1/temperature), the same on all ranks and resumable.

(`datasets.interleave_datasets` draws a task per item, which would mix tasks within a step.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from mpoe.config.checks import check_integer


def multitask_batches(
    sizes: Mapping[str, int], batch_size: int, num_steps: int, temperature: float = 1.0, seed: int = 0
) -> np.ndarray:
    """The items of every optimizer step as indices into the concatenation of the tasks' items, in the order of
    ``sizes``: int64 [num_steps, batch_size].

    All items of a step come from one task; each task's items are visited in shuffled passes. Everything follows from
    the arguments: a run resumes with the rows from its step on, and rank r of R takes the columns ``[:, r::R]``.

    Args:
        sizes: items of each task.
        batch_size: items per optimizer step, of all ranks and micro-batches together.
        num_steps: number of optimizer steps.
        temperature: 1 draws tasks in proportion to their size, infinity draws all alike.
        seed: of tasks and items.

    Raises:
        ValueError: no task, a size or ``batch_size`` < 1, ``num_steps`` < 0, or a temperature that is not > 0.
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
    powers = (np.array([*sizes.values()], dtype=np.float64) / max(sizes.values())) ** (1.0 / temperature)
    draws = _generator(seed).choice(len(sizes), size=num_steps, p=powers / powers.sum())
    found = np.empty((num_steps, batch_size), dtype=np.int64)
    first = 0
    for task, size in enumerate(sizes.values()):
        count = int((draws == task).sum())
        turns = range(math.ceil(count * batch_size / size))
        if turns:
            passes = [_generator(seed, task + 1, turn).permutation(size) for turn in turns]
            found[draws == task] = first + np.resize(passes, (count, batch_size))
        first += size
    return found


def _generator(*seed: int) -> np.random.Generator:
    """Random numbers by ``seed``, the same on every machine. Zeros at the end of ``seed`` change nothing."""
    return np.random.Generator(np.random.PCG64(seed))
