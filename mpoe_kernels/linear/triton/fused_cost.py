"""When the fused kernels can run. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import INDICES, BlockDims
from mpoe_kernels.linear.triton.fused_tiles import (
    MOST_BOND,
    Cut,
    FusedTile,
    Sides,
    best_tile,
    fused_table,
)
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


def can_fuse(plan: Contraction, target: Target, half: bool) -> bool:
    """Whether a ``rebuild``'s weights can stay on chip.

    Args:
        plan: the contraction.
        target: what the kernels are compiled for.
        half: left · central of all experts is computed once, in a separate launch.
    """
    if plan.strategy != "rebuild" or fused_reasons(plan.dims, plan.dtype, target):
        return False
    unused = half and plan.phase == "backward" and not plan.need[0]
    return not unused and (not half or half_fits(plan.dims, plan.num_experts))
