"""Interleaved timing: every function runs once per round, so that drift of the machine affects all of them equally.

A function's figure is the median over rounds of (its time / the baseline's time in the same round).
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

Function = Callable[[], object]
Measure = Callable[[Function, int], float]  # (function, repeats) -> seconds of all repeats together

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Budget:
    """How long to measure.

    Attributes:
        seconds_each: approximate time spent on one function in one phase.
        sample_seconds: shortest sample; quicker functions are called several times per sample.
        min_rounds: fewest rounds; slow functions get as many as fit into three times `seconds_each`, at least one.
        max_rounds: most rounds.
    """

    seconds_each: float = 1.5
    sample_seconds: float = 0.005
    min_rounds: int = 3
    max_rounds: int = 21


@dataclass(frozen=True)
class Timing:
    """Figures of one function.

    Attributes:
        seconds: median time of one call.
        x: median over rounds of the ratio to the baseline's time in the same round; NaN without a baseline.
        low, high: 10th and 90th percentiles of that ratio (of ``seconds`` without a baseline).
        rounds: samples taken.
    """

    seconds: float
    x: float
    low: float
    high: float
    rounds: int


def cpu_measure(clock: Callable[[], float] = time.perf_counter) -> Measure:
    """Time repeats with a clock."""

    def measure(function: Function, repeats: int) -> float:
        start = clock()
        for _ in range(repeats):
            function()
        return clock() - start

    return measure


def cuda_measure() -> Measure:
    """Time repeats with CUDA events on the current stream."""

    def measure(function: Function, repeats: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return measure


@contextmanager
def collection_off() -> Iterator[None]:
    """Disable garbage collection inside the block."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _plan(seconds: Mapping[str, float], budget: Budget) -> tuple[dict[str, int], dict[str, int]]:
    """Calls per sample and number of rounds of every function, from the seconds that one call takes."""
    repeats, rounds = {}, {}
    for name, once in seconds.items():
        once = max(once, 1e-9)
        repeats[name] = max(1, min(2000, math.ceil(budget.sample_seconds / once)))
        sample = repeats[name] * once
        least = max(1, min(budget.min_rounds, int(3 * budget.seconds_each / sample)))
        rounds[name] = max(least, min(budget.max_rounds, int(budget.seconds_each / sample)))
    return repeats, rounds


def _takes_part(round_number: int, own_rounds: int, all_rounds: int) -> bool:
    """Spread ``own_rounds`` evenly over ``all_rounds``."""
    return (round_number + 1) * own_rounds // all_rounds > round_number * own_rounds // all_rounds


def interleave(
    functions: Mapping[str, Function],
    baseline: str | None = None,
    budget: Budget | None = None,
    measure: Measure | None = None,
) -> dict[str, Timing]:
    """Time functions round by round in one process.

    Args:
        functions: by name; each is first called once, which does not count, to size its samples and to warm it up.
        baseline: the function by whose time all others' are divided; it takes part in every round.
        budget: see `Budget`.
        measure: returns the seconds of a sample; default: by the wall clock.

    Returns:
        A `Timing` for every function.

    Raises:
        ValueError: a baseline that is not among the functions.
    """
    if baseline is not None and baseline not in functions:
        raise ValueError(f"baseline must be one of {list(functions)}; got {baseline!r}")
    budget = Budget() if budget is None else budget
    measure = cpu_measure() if measure is None else measure
    names = list(functions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    ratios: dict[str, list[float]] = {name: [] for name in names}
    with collection_off():
        repeats, rounds = _plan({name: measure(functions[name], 1) for name in names}, budget)
        total = max(rounds.values(), default=0)
        if baseline is not None:
            rounds[baseline] = total
        for number in range(total):
            first = number % len(names)
            seconds = {
                name: measure(functions[name], repeats[name]) / repeats[name]
                for name in names[first:] + names[:first]
                if _takes_part(number, rounds[name], total)
            }
            for name, value in seconds.items():
                samples[name].append(value)
                if baseline is not None:
                    ratios[name].append(value / max(seconds[baseline], 1e-12))
    return {name: _timing(samples[name], ratios[name]) for name in names}


def _timing(samples: Sequence[float], ratios: Sequence[float]) -> Timing:
    spread = ratios or samples
    return Timing(
        seconds=float(np.median(samples)),
        x=float(np.median(ratios)) if ratios else math.nan,
        low=float(np.quantile(spread, 0.1)),
        high=float(np.quantile(spread, 0.9)),
        rounds=len(samples),
    )
