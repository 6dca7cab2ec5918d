"""Measured peak memory of a call: from the allocator's record of every allocation, and from resident pages."""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Memory:
    """Bytes on top of what was allocated before the call.

    Attributes:
        peak: the most that torch's allocator held at any time: temporaries, saved activations, results, gradients.
        kept: the part still alive when the call returned (its result, gradients).
        resident: peak growth of the process's resident memory. It includes what libraries and kernels allocate
            directly from the system; ``None`` where it cannot be measured.
    """

    peak: int
    kept: int
    resident: int | None = None

    @property
    def temporary(self) -> int:
        """What the call needed beyond what it left behind, by the larger of the two measurements."""
        return max(self.peak, self.resident or 0) - self.kept


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def resident_peak(function: Callable[[], object]) -> int | None:
    """Call the function; peak growth of resident memory meanwhile, ``None`` where the system does not report it.

    The C library's free memory is returned first, so that the call must fetch every page that it uses. Call the
    function once beforehand; otherwise what it loads or compiles the first time counts too.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")
        before = _resident("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        function()
        return None
    result = function()
    peak = _resident("VmHWM")
    del result
    return max(peak - before, 0)


def peak_memory(
    function: Callable[[], Result], device: torch.device | str = "cpu", resident: bool = False
) -> tuple[Memory, Result]:
    """Run ``function`` and measure; returns the memory that it needed and its result.

    On the CPU, every allocation by torch's allocator counts, including those in C++ kernels; with ``resident``, the
    process's resident memory is measured in a second run. On CUDA, the caching allocator's counters are read.
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
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    return Memory(peak, current, resident_peak(function) if resident else None), result
