"""`--compute_time`, `--compute_memory` and `--print_num_parameters`: measurements of a run."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from mpoe.cli.parsing import option


@dataclass
class MeasureOptions:
    """Options of the report."""

    _argument_group_name = "report"

    compute_time: bool = option(False, "report the time of a training step, and items per second")
    compute_memory: bool = option(False, "report the most memory used: of the GPU, or of the process")
    print_num_parameters: bool = option(False, "print the number of parameters by kind before training")


def print_parameters(model: Any) -> None:
    """Print the parameter report of an MPOE model, or the total of a dense one."""
    from mpoe.cli.convert import show_parameters

    report = parameters_of(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    show_parameters({**report, "trainable": trainable})


def parameters_of(model: Any) -> dict[str, int]:
    """The parameter report of an MPOE model, or the total of a dense one."""
    if hasattr(model, "parameter_report"):
        return model.parameter_report()
    return {"total": sum(p.numel() for p in model.parameters())}


def peak_of_process() -> dict[str, Any]:
    """Peak memory so far in bytes: of torch on the GPU, or of the whole process on the CPU."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
    try:
        import resource
    except ImportError:  # Windows
        return {"device": "cpu", "peak_bytes": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": "cpu", "peak_bytes": peak if sys.platform == "darwin" else peak * 1024}


def measured(options: MeasureOptions, seconds: float, steps: int, items_per_step: int) -> dict[str, Any]:
    """The requested measurements, JSON-able; also prints them."""
    report: dict[str, Any] = {}
    if options.compute_time:
        per_step = seconds / max(steps, 1)
        report["time"] = {
            "train_seconds": seconds,
            "seconds_per_step": per_step,
            "items_per_second": items_per_step / per_step if per_step else None,
        }
        print(f"training took {seconds:.1f} s: {per_step:.3f} s per step of {items_per_step} items")
    if options.compute_memory:
        report["memory"] = peak_of_process()
        peak = report["memory"]["peak_bytes"]
        shown = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"most memory used ({report['memory']['device']}): {shown}")
    return report
