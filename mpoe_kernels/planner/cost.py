"""Predicted time of a step: roofline (Williams, Waterman and Patterson, CACM 2009) and the price of launching it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.steps import Step

# A GPU cuts results into tiles of about this many rows and columns, one for a multiprocessor at a time.
_TILE = 64
_SHORT_SIDE = 0.4


class StepTime(NamedTuple):
    """Seconds of a step: ``compute`` and ``memory`` overlap, ``overhead`` does not."""

    compute: float
    memory: float
    overhead: float

    @property
    def total(self) -> float:
        return max(self.compute, self.memory) + self.overhead


def _shortness(m: float, n: float, k: float) -> float:
    return 1 / m + _SHORT_SIDE * (1 / n + 1 / k)


def half_size(m: float, n: float, k: float, efficiency: float) -> float:
    """`Hardware.half_size` of a device on which one GEMM reaches ``efficiency``, the part of the large-GEMM rate."""
    return max(0.5, (1 / efficiency - 1) / _shortness(m, n, k))


def gemm_efficiency(m: float, n: float, k: float, batch: int, dtype: torch.dtype, hardware: Hardware) -> float:
    """Part of the large-GEMM rate that ``batch`` GEMMs of one size reach.

    Every short side costs: loading a strip of the other operand is spread over fewer multiply-adds. Half of the rate is
    lost at ``half_size`` rows, and at `_SHORT_SIDE` of that in columns or in the inner size (fitted to the GEMMs of
    MKL and oneDNN on one core). A GPU also idles where there are fewer tiles than multiprocessors.
    """
    half = hardware.half_size.of(dtype)
    efficiency = 1 / (1 + half * _shortness(m, n, k))
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
    return StepTime(compute, memory, hardware.launch_seconds + hardware.call_seconds.of(dtype) * step.batch)


def step_seconds(step: Step, dtype: torch.dtype, hardware: Hardware) -> float:
    """The longer of computing and moving, plus overhead."""
    return step_time(step, dtype, hardware).total
