"""Predicted time of a step: roofline (Williams, Waterman and Patterson, CACM 2009) and the price of launching it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.steps import Step

# A GPU cuts results into tiles of about this many rows and columns, one for a multiprocessor at a time.
_TILE = 64


class StepTime(NamedTuple):
    """Seconds of a step: ``compute`` and ``memory`` overlap, ``overhead`` does not."""

    compute: float
    memory: float
    overhead: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.overhead


def gemm_efficiency(m: float, n: float, k: float, batch: int, dtype: torch.dtype, hardware: Hardware) -> float:
    """Part of the large-GEMM rate that ``batch`` GEMMs of one size reach.

    Every short side costs: half of the rate is lost at ``half_size`` rows, and at a quarter of that in columns or in
    the inner size (from GEMMs of BLAS libraries at those sizes). A GPU also idles where there are fewer tiles than
    multiprocessors.
    """
    half = hardware.half_size.of(dtype)
    efficiency = m / (m + half) * n / (n + half / 4) * k / (k + half / 4)
    if hardware.kind == "gpu":
        tiles = batch * math.ceil(m / _TILE) * math.ceil(n / _TILE)
        # The inner size can be split too, at some cost.
        splits = max(1.0, k / 512)
        efficiency *= min(1.0, tiles * splits / hardware.units)
    return efficiency


def step_time(step: Step, dtype: torch.dtype, hardware: Hardware) -> StepTime:
    """Computing, moving bytes, and the overhead of the step and of every GEMM in it."""
    compute = 0.0
    if step.flops:
        efficiency = gemm_efficiency(step.m, step.n, step.k, step.batch, dtype, hardware)
        compute = step.flops / (hardware.flops_per_second(dtype) * efficiency)
    memory = step.memory_bytes(hardware.cache_bytes) / hardware.bandwidth
    memory = max(memory, step.bytes / hardware.cache_bandwidth)
    return StepTime(compute, memory, hardware.launch_seconds + hardware.call_seconds * step.batch)


def step_seconds(step: Step, dtype: torch.dtype, hardware: Hardware) -> float:
    """The longer of computing and moving, plus overhead."""
    return step_time(step, dtype, hardware).total
