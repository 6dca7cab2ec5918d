"""The machine that a result comes from, and the pinning of threads for quiet measurements."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mpoe_kernels import __version__, available_backends, backend_reasons
from mpoe_kernels.contract.kept import processor_name
from mpoe_kernels.info import installed_version
from mpoe_kernels.native_library import NATIVE_LIBRARY

LIBRARIES = ("torch", "triton", "transformers", "tensorly-torch", "opt_einsum", "numpy")


def usable_cores() -> list[int]:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _set_affinity(processors: Sequence[int]) -> None:
    """Move every thread of this process, including OpenMP's pool."""
    tasks = Path("/proc/self/task")
    for task in tasks.iterdir() if tasks.is_dir() else ():
        try:
            os.sched_setaffinity(int(task.name), processors)
        except OSError:  # the thread has ended in the meantime
            continue


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Use ``threads`` torch threads, pinned to as many processors, the first allowed ones; undone at the end.

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


def revision() -> str | None:
    """The measured commit, with ``+`` if files differ from it; ``None`` outside a checkout."""

    def git(*arguments: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed copy may be inside another checkout
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def system_name() -> str:
    """Name and version of the system, without a builder's suffix."""
    version = re.match(r"[\d.]*", platform.release())
    return f"{platform.system()} {version.group() if version else ''} {platform.machine()}"


def describe(device: str, threads: int, clock: str) -> dict[str, Any]:
    """What readers must know to compare results."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "processor": processor_name() or platform.machine(),
        "gpu": gpu,
        "device": device,
        "cores": len(usable_cores()),
        "threads": threads,
        "clock": clock,
        "native_isa": NATIVE_LIBRARY.info.get("isa_used"),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": system_name(),
        "python": platform.python_version(),
        "mpoe": __version__,
        "revision": revision(),
        "libraries": {name: installed_version(name) for name in LIBRARIES},
        "backends": list(available_backends()),
        "backends_missing": [name for name, reasons in backend_reasons().items() if reasons],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def title_of(machine: dict[str, Any]) -> str:
    """One line for the title of a table."""
    if machine["gpu"]:
        return str(machine["gpu"])
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['processor']} ({machine['isa']}), {threads}"
