"""Measured peak memory of a call: from the allocator's record of every allocation, and from resident pages."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

Result = TypeVar("Result")


class Memory(NamedTuple):
    """Bytes on top of what was allocated before the call.

    Attributes:
        peak: the most that was held at any time: temporaries, saved activations, results, gradients.
        kept: the part still alive when the call returned (its result, gradients).
    """

    peak: int
    kept: int


def resident_peak(function: Callable[[], object]) -> int | None:
    """Call the function; peak growth of resident memory meanwhile, ``None`` where the system does not report it.

    The C library's free memory is returned first, so that the call must fetch every page that it uses. Call the
    function once beforehand; otherwise what it loads or compiles the first time counts too.
    """

    def kibibytes(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(field)))

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kibibytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None
    result = function()
    growth = kibibytes("VmHWM") - before
    del result
    return 1024 * max(growth, 0)


def peak_memory(
    function: Callable[[], Result], device: torch.device | str = "cpu", resident: bool = False
) -> tuple[Memory, Result]:
    """Run ``function`` and measure; returns the memory that it needed and its result.

    On the CPU, every allocation by torch's allocator counts; with ``resident``, what libraries and kernels allocate
    directly from the system too, by the process's resident memory in a second run. On CUDA, the caching allocator's
    counters are read.
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
    return Memory(max(peak, (resident_peak(function) or 0) if resident else 0), current), result
