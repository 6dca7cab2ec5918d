"""Predicted time of a step: arithmetic, memory traffic and launch overhead.

A GPU overlaps arithmetic and memory traffic (the roofline of Williams, Waterman and Patterson, CACM 2009); a CPU core
does one after the other.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.steps import Step

# glibc maps arrays of the first size at every allocation; smaller ones come from its heap, whose end it returns to the
# system (about every second time, as measured); below the second size memory is reused.
_MAPPED_BYTES, _REUSED_BYTES, _GIVEN_BACK = 32 << 20, 1 << 20, 0.5
# A GPU splits results into tiles of about this many rows and columns; a multiprocessor computes one at a time.
_TILE = 64
_SHORT_SIDE = 0.4


def new_bytes(size: float) -> float:
    """How many bytes of an array of ``size`` bytes a CPU's allocator is expected to get new from the system."""
    if size < _REUSED_BYTES:
        return 0.0
    return size if size >= _MAPPED_BYTES else _GIVEN_BACK * size


Sizes = tuple[float, float, float]  # m, n, k of a GEMM


class StepTime(NamedTuple):
    """Seconds of a step.

    Attributes:
        compute: arithmetic; on a GPU only if it takes longer than the memory traffic, which it then hides.
        memory: memory traffic; on a GPU only if it takes longer than the arithmetic.
        overhead: of launching the step and each of its GEMMs.
    """

    compute: float
    memory: float
    overhead: float

    @property
    def total(self) -> float:
        return self.compute + self.memory + self.overhead


def _shortness(m: float, n: float, k: float) -> float:
    return 1 / m + _SHORT_SIDE * (1 / n + 1 / k)


def half_size(m: float, n: float, k: float, efficiency: float) -> float:
    """`Hardware.half_size` of a device on which one GEMM reaches ``efficiency``, a fraction of the large-GEMM rate."""
    return max(0.5, (1 / efficiency - 1) / _shortness(m, n, k))


def rate_and_half_size(large: Sizes, large_rate: float, short: Sizes, short_rate: float) -> tuple[float, float]:
    """The asymptotic FLOP/s of large GEMMs and `Hardware.half_size` of a device, from the rates of two GEMMs.

    The larger one need not reach the asymptotic rate: `gemm_efficiency` reproduces both measured rates. If the short
    one is as fast as if its size had no effect, or too slow for any rate to fit, the larger one's rate is taken.
    """
    sizes = [_shortness(*large), _shortness(*short)]
    lost = short_rate * sizes[1] - large_rate * sizes[0]
    half = (large_rate - short_rate) / lost if lost > 0 else math.inf
    # More than twice the measured rate would not be a sensible extrapolation.
    if not 0.5 <= half <= 1 / sizes[0]:
        return large_rate, half_size(*short, min(1.0, short_rate / large_rate))
    return large_rate * (1 + half * sizes[0]), half


def gemm_efficiency(m: float, n: float, k: float, batch: int, dtype: torch.dtype, hardware: Hardware) -> float:
    """Fraction of the large-GEMM rate that ``batch`` GEMMs of one size reach.

    Every short side costs: loading a strip of the other operand is amortised over fewer multiply-adds. Half of the rate
    is lost at ``half_size`` rows, and at `_SHORT_SIDE` of that in columns or in the inner size (fitted to the GEMMs of
    MKL and oneDNN on one core). A GPU also idles if there are fewer tiles than multiprocessors.
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
    """The parts of a step's time."""
    compute = 0.0
    if step.flops:
        efficiency = gemm_efficiency(step.m, step.n, step.k, step.batch, dtype, hardware)
        compute = step.flops / (hardware.flops_per_second(dtype) * efficiency)
    overhead = hardware.launch_seconds + hardware.call_seconds.of(dtype) * step.batch
    memory = step.memory_bytes(hardware.cache_bytes) / hardware.bandwidth
    memory = max(memory, step.bytes / hardware.cache_bandwidth)
    if hardware.kind == "gpu":
        hidden = compute >= memory
        return StepTime(compute if hidden else 0.0, 0.0 if hidden else memory, overhead)
    if step.flops:
        # A core hides little: before it multiplies, a library packs what its own cache cannot hold, whichever level it
        # comes from.
        own_cache = step.batch * hardware.units * hardware.sram_bytes
        memory = max(0, step.bytes - own_cache) / hardware.bandwidth
    return StepTime(compute, memory, overhead)
