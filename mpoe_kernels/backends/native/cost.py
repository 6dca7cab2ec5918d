"""How long the compiled CPU kernels are predicted to take."""

from __future__ import annotations

from mpoe_kernels.planner import Contraction, Hardware, hardware_here
from mpoe_kernels.planner.steps import Step

# Of the library's rate for large GEMMs, what register tiles reach that stay in the second-level cache.
TILE_RATE = 1.0
TILE_ROWS = 14  # csrc/cpu/gemm.h: rows of a register tile, and columns of a packed panel
PANEL = 32
# A tile's loads and stores, in rows of multiply-adds (for each step of k) and in steps of k (for the whole tile).
LOAD_ROWS = 2.0
STORE_STEPS = 12.0
# Each busy expert: its blocks packed, its rows arranged.
EXPERT_SECONDS = 4e-6


def step_seconds(step: Step, plan: Contraction, hardware: Hardware) -> float:
    """A step by register tiles: padded columns and the tiles' own loads and stores are paid like multiply-adds."""
    if not step.flops:
        return 0.0
    tiles = -(-step.m // TILE_ROWS)
    rows = step.m + LOAD_ROWS * tiles
    columns = -(-step.n // PANEL) * PANEL
    steps_of_k = step.k + STORE_STEPS * (4 / plan.dtype.itemsize)
    compute = 2 * rows * columns * steps_of_k * step.batch / (hardware.flops_per_second(plan.dtype) * TILE_RATE)
    return max(compute, step.memory_bytes(hardware.cache_bytes) / hardware.bandwidth)


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the native kernels on this machine's CPU."""
    hardware = hardware_here("cpu")
    steps = sum(step_seconds(step, plan, hardware) for step in plan.steps)
    return hardware.launch_seconds + EXPERT_SECONDS * plan.busy_experts + steps
