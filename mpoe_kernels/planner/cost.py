"""Predicted time of a step: roofline (Williams, Waterman and Patterson, CACM 2009) and the price of launching it."""

from __future__ import annotations

import torch

from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.steps import Step


def gemm_efficiency(m: float, n: float, k: float, hardware: Hardware) -> float:
    """Part of the large-GEMM rate that a small GEMM reaches."""
    half_m, half_n, half_k = hardware.half_size
    return m / (m + half_m) * n / (n + half_n) * k / (k + half_k)


def step_seconds(step: Step, dtype: torch.dtype, hardware: Hardware) -> float:
    """The longer of computing and moving, and the overhead of the step and of every GEMM in it."""
    compute = 0.0
    if step.flops:
        rate = hardware.flops_per_second(dtype) * gemm_efficiency(step.m, step.n, step.k, hardware)
        compute = step.flops / rate
    move = step.memory_bytes(hardware.cache_bytes) / hardware.bandwidth
    return max(compute, move) + hardware.launch_seconds + hardware.call_seconds * step.batch
