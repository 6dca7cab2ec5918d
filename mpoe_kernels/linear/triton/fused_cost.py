"""When the fused kernels can run, and their predicted times. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.linear.triton.fused_tiles import (
    MOST_BOND,
    Cut,
    FusedTile,
    Sides,
    best_tile,
    expected_row_tiles,
    filled_up,
    fused_table,
    rebuild_work,
    step_operands,
)
from mpoe_kernels.planner import Contraction, Hardware
from mpoe_kernels.planner.contraction import expected_busy_experts
from mpoe_kernels.planner.orders import INDICES, BlockDims, merge_flops
from mpoe_kernels.triton.architecture import Target


def fused_reasons(dims: BlockDims, dtype: torch.dtype, target: Target) -> list[str]:
    """Why a weight cannot be rebuilt on chip (empty: it can)."""
    reasons = []
    if max(dims.a, dims.b) > MOST_BOND:
        reasons.append(f"bonds {dims.a} and {dims.b} do not fit on chip; at most {MOST_BOND}")
    if dims.is_separable:
        reasons.append("a separable weight is never rebuilt")
    if reasons:
        return reasons
    for transposed, purpose in ((False, "rows"), (True, "rows"), (False, "gradient")):
        if _choice(Sides.of(dims, transposed), 1.0, dtype, target, purpose) is None:
            reasons.append(f"no {purpose} tile fits bonds {dims.a} and {dims.b} on {target.architecture}")
    return list(dict.fromkeys(reasons))


def _choice(
    sides: Sides, rows: float, dtype: torch.dtype, target: Target, purpose: str
) -> tuple[FusedTile, Cut] | None:
    tiles = fused_table(purpose)[target.architecture][dtype.itemsize]
    return best_tile(tiles, sides, rows, dtype.itemsize, target.shared_memory, purpose)


def half_fits(dims: BlockDims, experts: int) -> bool:
    """Whether left · central of all experts together fits within two weights' memory."""
    return experts * dims.elements(INDICES["LC"]) <= 2 * dims.weight_elements


def _seconds(flops: float, cached_bytes: float, memory_bytes: float, dtype: torch.dtype, hardware: Hardware) -> float:
    """Roofline of one launch: arithmetic, reads from cache and reads from memory overlap."""
    rate = hardware.flops_per_second(dtype)
    slowest = max(flops / rate, cached_bytes / hardware.cache_bandwidth, memory_bytes / hardware.bandwidth)
    return slowest + hardware.launch_seconds


def _busy(experts: int, slots: int) -> int:
    return max(1, expected_busy_experts(experts, slots))


def rows_seconds(
    dims: BlockDims,
    transposed: bool,
    half: bool,
    experts: int,
    slots: int,
    dtype: torch.dtype,
    target: Target,
    hardware: Hardware,
) -> float:
    """Rows times W, or times W^T, in one launch, plus computing left · central if ``half``."""
    sides, busy, size = Sides.of(dims, transposed), _busy(experts, slots), dtype.itemsize
    purpose = "half" if half else "rows"
    found = _choice(sides, slots / experts, dtype, target, purpose)
    if found is None:
        return float("inf")
    tile, extents = found
    k_tiles, n_tiles = extents.tiles(sides)
    row_tiles = busy * expected_row_tiles(slots / busy, tile)
    steps = row_tiles * k_tiles * n_tiles
    area = extents.k * extents.n
    flops = 2 * steps * area * (tile.m + rebuild_work(sides, extents, half))
    operands = step_operands(sides, extents, tile, purpose)
    weights = busy * (dims.elements(INDICES["L"]) + dims.elements(INDICES["R"])) + dims.elements(INDICES["C"])
    memory = weights + slots * (dims.in_features + dims.out_features)
    # With fewer programs than multiprocessors, a program waits for its own steps.
    idle = max(1.0, hardware.units / (row_tiles * n_tiles))
    seconds = _seconds(flops * idle, steps * operands * size * idle, memory * size, dtype, hardware)
    if half:
        elements = busy * (dims.elements(INDICES["L"]) + dims.elements(INDICES["LC"]))
        merging = busy * merge_flops(dims, "L", "C")
        seconds += _seconds(merging, elements * size, 0.0, dtype, hardware)
    return seconds


def gradient_seconds(
    dims: BlockDims,
    need: tuple[bool, bool, bool],
    experts: int,
    slots: int,
    dtype: torch.dtype,
    target: Target,
    hardware: Hardware,
) -> float:
    """Gradients of the blocks in ``need``: each computes dW on chip and projects it."""
    sides, busy, size = Sides.of(dims), _busy(experts, slots), dtype.itemsize
    found = _choice(sides, slots / experts, dtype, target, "gradient")
    if found is None:
        return float("inf")
    tile, extents = found
    k_tiles, n_tiles = extents.tiles(sides)
    a, b = filled_up(dims.a), filled_up(dims.b)
    tiles, area = busy * k_tiles * n_tiles, extents.k * extents.n
    steps = tiles * expected_row_tiles(slots / busy, tile)
    right_tiles = -(-sides.k[2] // extents.kr) * -(-sides.n[2] // extents.nr)
    second = extents.rows * a * b / right_tiles  # left or central, from what all columns gave
    projections = (extents.rows * extents.columns * b + second,) * 2 + (extents.rows * b * (a + extents.columns),)
    total = 0.0
    for wanted, projection in zip(need, projections, strict=True):
        if wanted:
            flops = 2 * (steps * area * tile.m + tiles * projection)
            cached = steps * step_operands(sides, extents, tile, "gradient") * size
            memory = slots * (dims.in_features + dims.out_features) * size
            total += _seconds(flops, cached, memory, dtype, hardware) + hardware.launch_seconds  # and its sum
    return total


def fused_seconds(plan: Contraction, target: Target, hardware: Hardware, half: bool) -> float:
    """Predicted time of a ``rebuild`` whose weights stay on chip; infinite if they cannot.

    Args:
        half: left · central of all experts is computed once, in a separate launch.
    """
    dims = plan.dims
    if plan.strategy != "rebuild" or fused_reasons(dims, plan.dtype, target):
        return float("inf")
    sizes = (plan.num_experts, plan.slots, plan.dtype, target, hardware)
    backward = plan.phase == "backward"
    if half and (not half_fits(dims, plan.num_experts) or (backward and not plan.need[0])):
        return float("inf")
    if not backward:
        return rows_seconds(dims, False, half, *sizes)
    seconds = gradient_seconds(dims, plan.need[1:], *sizes)
    return seconds + rows_seconds(dims, True, half, *sizes) if plan.need[0] else seconds
