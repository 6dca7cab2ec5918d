"""Peak memory of one call, measured: the allocator's own record of every allocation and release."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before the call.

    Attributes:
        peak: the most at any moment: temporaries, saved activations, results and gradients.
        kept: still alive when the call returned (its result, gradients).
    """

    peak: int
    kept: int

    @property
    def temporary(self) -> int:
        """What the call needed beyond what it left behind."""
        return self.peak - self.kept


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> Memory:
    """Run ``function`` once and measure.

    On the CPU every allocation of torch's allocator counts, those inside C++ kernels included; memory that a library
    takes from the system by itself (oneDNN's scratchpads) is not seen. On CUDA the caching allocator's counters.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        memory = Memory(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
        del result
        return memory
    # The profiler's library logs to stderr otherwise; it reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
            result = function()
    current = peak = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    del result
    return Memory(peak, current)
