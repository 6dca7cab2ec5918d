"""`mpoe info`: versions, kernel backends and why the others cannot run here, devices and cores."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "matplotlib", "datasets")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def usable_cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def collect() -> dict[str, Any]:
    """Everything `mpoe info` shows, JSON-able."""
    import torch

    from mpoe_kernels import __version__, backend_reasons

    devices = [f"cpu ({platform.machine()})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return {
        "mpoe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": backend_reasons(),
        "devices": devices,
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts of `collect` as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"mpoe {facts['mpoe']}", show_header=False)
    table.add_row("Python", f"{facts['python']} on {facts['platform']}")
    for name, version in facts["packages"].items():
        table.add_row(name, version)
    table.add_row("devices", ", ".join(facts["devices"]))
    table.add_row("cores", f"{facts['cores']} usable, torch takes {facts['torch_threads']} threads")
    console.print(table)
    backends = Table("backend", "runs here", "why not", title="Kernel backends")
    for name, reasons in facts["backends"].items():
        backends.add_row(name, "no" if reasons else "yes", "; ".join(reasons))
    console.print(backends)
