"""Measured peak memory of a call, from the allocator's record of every allocation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Memory(NamedTuple):
    """Bytes on top of what was allocated before the call.

    Attributes:
        peak: the most that torch's allocator held at any time: temporaries, saved activations, results, gradients.
        kept: the part still alive when the call returned (its result, gradients).
    """

    peak: int
    kept: int


def peak_memory(function: Callable[[], Result], device: torch.device | str = "cpu") -> tuple[Memory, Result]:
    """Run ``function`` and measure; returns the memory that it needed and its result.

    On the CPU, every allocation by torch's allocator counts, including those in C++ kernels. On CUDA, the caching
    allocator's counters are read.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before), result
    # Otherwise the profiler's library logs to stderr; it reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
            result = function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return Memory(peak, current), result
