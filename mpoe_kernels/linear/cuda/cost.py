"""Which of the CUDA kernels compute a contraction.

The strategy ``rebuild`` has two variants: step by step through a scratch buffer of some experts' weights, and in panels
that never leave shared memory. The forward of ``chain`` and ``separable`` has one for few rows, in one launch. Each is
a separate candidate.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear.cuda.few import Few, best_few
from mpoe_kernels.linear.cuda.panels import Panel, best_panel
from mpoe_kernels.linear.gpu.work import rate
from mpoe_kernels.triton.hardware import Hardware, hardware_here

# Rows, columns and inner size of a step of the widest tile.
STEP_TILE = (128, 128, 64)


class Way(NamedTuple):
    """One way to compute a contraction.

    Attributes:
        name: name of the candidate.
        cut: how a single-launch kernel divides the product into blocks; None: step by step.
    """

    name: str
    cut: Panel | Few | None


def _in_panels(plan: Contraction, hardware: Hardware) -> Way | None:
    """``rebuild`` in panels, its gradients of blocks by steps. None if no panel fits, or nothing would use one."""
    backward = plan.phase == "backward"
    if plan.strategy != "rebuild" or plan.slots == 0 or (backward and not plan.need[0]):
        return None
    reached = rate(STEP_TILE, plan.dtype, hardware, "warp")
    sizes = (plan.dtype.itemsize, plan.busy_experts, plan.slots)
    panel = best_panel(plan.dims, backward, *sizes, reached, hardware)
    return None if panel is None else Way("rebuild in panels", panel)


def _in_one_launch(plan: Contraction, hardware: Hardware) -> Way | None:
    """``chain`` or ``separable`` for few rows, without saving central rows. None if there is no such kernel."""
    if plan.strategy not in ("chain", "separable") or plan.phase != "forward" or plan.keeps:
        return None
    few = best_few(plan.dims, plan.dtype.itemsize, plan.slots, hardware)
    return None if few is None else Way(f"{plan.strategy} in one launch", few)


@lru_cache(maxsize=4096)
def ways(plan: Contraction, hardware: Hardware) -> tuple[Way, ...]:
    """Every way to compute a contraction: step by step, and the other variants of its strategy and phase."""
    by_steps = Way(plan.strategy, None)
    others = (_in_panels(plan, hardware), _in_one_launch(plan, hardware))
    return (by_steps, *(form for form in others if form is not None))


@lru_cache(maxsize=16)
def _with_shared_memory(hardware: Hardware, available: int) -> Hardware:
    return replace(hardware, sram_bytes=min(hardware.sram_bytes, available))


def gpu(device: str) -> Hardware:
    """Numbers of a GPU; for an unknown one those of the nearest, but with its own shared memory."""
    properties = torch.cuda.get_device_properties(device)
    return _with_shared_memory(hardware_here(device), properties.shared_memory_per_multiprocessor)
