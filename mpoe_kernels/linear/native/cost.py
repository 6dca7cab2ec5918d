"""Predicted times of the compiled CPU kernels: `work_of` a contraction at this machine's rates.

The cost of a tile was fitted to one core (tools/judge_costs.py): of 161 times from 0.7 ms to 13 s, four fifths were
then within a tenth of the prediction.
"""

from __future__ import annotations

import math

from mpoe_kernels.linear.native.work import tasks_of, work_of
from mpoe_kernels.planner import Contraction, Hardware, hardware_here

# Allocation, threads and Python overhead of a call.
CALL_SECONDS = 30e-6


def _idle(tasks: int | None, cores: int) -> float:
    """Time relative to that with all cores busy until the end."""
    return 1.0 if tasks is None else math.ceil(tasks / cores) * cores / tasks


def fixed_seconds(plan: Contraction, hardware: Hardware) -> float:
    """Time of a call without its register tiles: copies, sums (in float32), the first use of memory, call overhead."""
    work = work_of(plan)
    copies = (2 * work.copied * plan.dtype.itemsize + 2 * work.summed * 4) / hardware.bandwidth
    new = work.new / hardware.new_memory_bandwidth
    by_all = 2 * work.copied_by_all * plan.dtype.itemsize / hardware.bandwidth
    by_all += work.new_by_all / hardware.new_memory_bandwidth
    return CALL_SECONDS + by_all + (copies + new) * _idle(tasks_of(plan), hardware.units)


def _seconds(plan: Contraction, hardware: Hardware) -> float:
    if not plan.steps:
        return CALL_SECONDS
    work = work_of(plan)
    tiles = work.flops / (hardware.tile_rate.of(plan.dtype) * hardware.flops_per_second(plan.dtype))
    tiles += work.tiles * hardware.store_seconds.of(plan.dtype) / hardware.units
    return fixed_seconds(plan, hardware) + tiles * _idle(tasks_of(plan), hardware.units)


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the native kernels on this machine's CPU."""
    return _seconds(plan, hardware_here("cpu"))
