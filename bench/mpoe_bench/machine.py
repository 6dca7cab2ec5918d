"""The machine a result belongs to, and a process that leaves it alone while it measures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpoe_bench.timing import Measure, quantile
from mpoe_kernels import __version__, available_backends, backend_reasons

LIBRARIES = ("torch", "triton", "transformers", "tensorly-torch", "opt_einsum", "numpy")


def usable_cores() -> list[int]:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _set_affinity(processors: Sequence[int]) -> None:
    """Every thread of this process, those of OpenMP's pool included."""
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            os.sched_setaffinity(int(task.name), processors)
        except OSError:  # the thread has ended meanwhile
            continue


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Use ``threads`` torch threads on as many processors, the first ones allowed; undone at the end.

    Raises:
        ValueError: more threads than processors, or none.
    """
    processors = usable_cores()
    if not 1 <= threads <= len(processors):
        raise ValueError(f"threads must be between 1 and {len(processors)}, the processors usable here; got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    movable = hasattr(os, "sched_setaffinity")
    if movable:
        _set_affinity(processors[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if movable:
            _set_affinity(processors)


def processor_name() -> str:
    """The CPU's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe(device: str, threads: int, clock: str) -> dict[str, Any]:
    """What a reader must know to compare results."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "processor": processor_name(),
        "gpu": gpu,
        "device": device,
        "cores": len(usable_cores()),
        "threads": threads,
        "clock": clock,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "mpoe": __version__,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "backends": list(available_backends()),
        "backends_missing": {name: reasons for name, reasons in backend_reasons().items() if reasons},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def title_of(machine: dict[str, Any]) -> str:
    """One line for titles of plots and reports."""
    if machine["gpu"]:
        return str(machine["gpu"])
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']} ({machine['isa']}), {threads}"


def measured_roofs(measure: Measure, device: str, scale: int = 2048) -> dict[str, float]:
    """What this machine reaches: FLOP/s of a large GEMM per dtype, and bytes/s of copying a large tensor.

    Args:
        measure: takes the seconds of a sample.
        device: where.
        scale: edge of the GEMM; the copied tensor holds ``8 scale^2`` floats.
    """
    roofs = {}
    for dtype in (torch.float32, torch.bfloat16):
        first, second = (torch.randn(scale, scale).to(device, dtype) for _ in range(2))
        seconds = [measure(lambda a=first, b=second: a @ b, 1) for _ in range(5)]
        roofs[str(dtype).split(".")[-1]] = 2 * scale**3 / quantile(seconds[1:], 0.25)
    source = torch.zeros(8 * scale * scale, device=device)
    target = torch.empty_like(source)
    seconds = [measure(lambda: target.copy_(source), 1) for _ in range(5)]
    roofs["bandwidth"] = 2 * source.numel() * source.element_size() / quantile(seconds[1:], 0.25)
    return roofs
