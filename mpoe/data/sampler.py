"""Multi-task sampling: one task per optimizer step, p ~ size^(1/temperature), the same on all ranks and resumable.

There is no hidden state: every step follows from the seed and the step's number. (`datasets.interleave_datasets` draws
a task per item, which would mix tasks within a step.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import numpy as np

from mpoe.config.checks import check_integer


class TemperatureSampler:
    """Which task each optimizer step trains on.

    Temperature 1 samples in proportion to size; infinity samples uniformly.

    Raises:
        ValueError: no task, a size < 1, or a temperature that is not > 0.
    """

    def __init__(self, sizes: Mapping[str, int], temperature: float = 1.0, seed: int = 0) -> None:
        if not sizes:
            raise ValueError("sizes must hold at least one task; got none")
        for name, size in sizes.items():
            check_integer(f"sizes[{name!r}]", size, 1)
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0; got {temperature}")
        self.names = tuple(sizes)
        self.sizes = tuple(sizes.values())
        self.temperature = temperature
        self.seed = seed
        # Relative to the largest size, so that no power overflows.
        powers = (np.asarray(self.sizes, dtype=np.float64) / max(self.sizes)) ** (1.0 / temperature)
        self._shares = powers / powers.sum()

    @property
    def probabilities(self) -> dict[str, float]:
        """Probability of each task."""
        return dict(zip(self.names, self._shares.tolist(), strict=True))

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Task indices of the steps start..stop-1, int64 [stop - start]."""
        if not 0 <= start <= stop:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop; got {start}, {stop}")
        return _generator(self.seed).choice(len(self.names), size=stop, p=self._shares)[start:]

    def task_at(self, step: int) -> str:
        """Name of the task of optimizer step ``step`` (from 0)."""
        return self.names[int(self.indices(step, step + 1)[0])]


class MultiTaskBatchSampler:
    """Batches of indices into the concatenation of the tasks' items, in the order of ``sizes``; a torch batch sampler.

    All micro-batches of an optimizer step come from one task, on every rank. Each task's items are visited in shuffled
    passes; an item is seen by one rank only within a pass. Batches are always full. The state is the number of
    optimizer steps done: construct with ``start_step`` (or :meth:`set_step`) to resume exactly.

    Args:
        sizes: items of each task.
        batch_size: items per micro-batch and rank.
        num_steps: total number of optimizer steps.
        temperature, seed: see :class:`TemperatureSampler`.
        accumulation: micro-batches per optimizer step.
        rank, world_size: of this process. Do not let another library shard this sampler again.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        batch_size: int,
        num_steps: int,
        temperature: float = 1.0,
        seed: int = 0,
        accumulation: int = 1,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
    ) -> None:
        for argument, value in (("batch_size", batch_size), ("accumulation", accumulation), ("world_size", world_size)):
            check_integer(argument, value, 1)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, world_size={world_size}); got {rank}")
        check_integer("num_steps", num_steps, 0)
        self.tasks = TemperatureSampler(sizes, temperature, seed)
        self.batch_size, self.num_steps, self.accumulation = batch_size, num_steps, accumulation
        self.rank, self.world_size = rank, world_size
        self.set_step(start_step)

    def set_step(self, step: int) -> None:
        """Continue with optimizer step ``step`` at the next iteration."""
        if not 0 <= step <= self.num_steps:
            raise ValueError(f"step must be in [0, num_steps={self.num_steps}]; got {step}")
        self.step = step

    def __len__(self) -> int:
        """Micro-batches left from the step it starts at."""
        return (self.num_steps - self.step) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        draws = self.tasks.indices(0, self.num_steps)
        visits = np.bincount(draws[: self.step], minlength=len(self.tasks.names)).tolist()
        sizes = self.tasks.sizes
        firsts = np.cumsum((0, *sizes[:-1])).tolist()

        @lru_cache(maxsize=2 * len(sizes))  # a batch may reach from one pass into the next
        def order(task: int, turn: int) -> np.ndarray:
            return firsts[task] + _generator(self.tasks.seed, task + 1, turn).permutation(sizes[task])

        for task in draws[self.step :].tolist():
            for micro in range(self.accumulation):
                batch = visits[task] * self.accumulation + micro
                start = (batch * self.world_size + self.rank) * self.batch_size
                places = (divmod(place, sizes[task]) for place in range(start, start + self.batch_size))
                yield [int(order(task, turn)[place]) for turn, place in places]
            visits[task] += 1


def _generator(*seed: int) -> np.random.Generator:
    """Random numbers by ``seed``, the same on every machine. Zeros at the end of ``seed`` change nothing."""
    return np.random.Generator(np.random.PCG64(seed))
