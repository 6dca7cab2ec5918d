"""How long the compiled CPU kernels are predicted to take: `work_of` a contraction at this machine's rates.

What a tile costs was fitted to one core (tools/judge_costs.py): of 161 times from 0.7 ms to 13 s, four fifths were then
within a tenth of the prediction.
"""

from __future__ import annotations

import math

from mpoe_kernels.linear.native.work import tasks_of, work_of
from mpoe_kernels.planner import Contraction, Hardware, hardware_here
from mpoe_kernels.planner.cost import new_bytes

# While k runs, a register tile does its multiply-adds at this multiple of the library's rate for large GEMMs, which
# includes what is counted apart here.
TILE_RATE = 1.13
# A core needs so long to round a tile and to write it where the next product reads it.
STORE_SECONDS = 65e-9
# Allocation, threads and the Python around a call.
CALL_SECONDS = 30e-6


def _new_bytes(plan: Contraction) -> float:
    """Bytes of the resulting rows that the allocator gets from the system."""
    if plan.phase == "forward":
        return new_bytes(plan.slots * plan.dims.out_features * plan.dtype.itemsize)
    return new_bytes(plan.slots * plan.dims.in_features * plan.dtype.itemsize) if plan.need[0] else 0.0


def _idle(tasks: int | None, cores: int) -> float:
    """Time over that of cores that are all busy to the end."""
    return 1.0 if tasks is None else math.ceil(tasks / cores) * cores / tasks


def _seconds(plan: Contraction, hardware: Hardware) -> float:
    if not plan.steps:
        return CALL_SECONDS
    work = work_of(plan)
    compute = work.flops / (TILE_RATE * hardware.flops_per_second(plan.dtype))
    compute += work.tiles * STORE_SECONDS / hardware.units
    copies = 2 * work.copied * plan.dtype.itemsize / hardware.bandwidth
    # A sum is of float32.
    sums = 2 * work.summed * 4 / hardware.bandwidth
    new = _new_bytes(plan) / hardware.new_memory_bandwidth
    return CALL_SECONDS + (compute + copies + sums) * _idle(tasks_of(plan), hardware.units) + new


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the native kernels on this machine's CPU."""
    return _seconds(plan, hardware_here("cpu"))
