"""Which contractions the Triton kernels can compute. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.gpu.budget import counting_reasons
from mpoe_kernels.linear.triton.fused_tiles import MOST_BOND, Sides, best_tile, fused_tiles
from mpoe_kernels.triton.architecture import Target

MOST_EXPERTS = 4096  # every program scans the offsets at once


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the Triton kernels cannot compute a contraction."""
    reasons = []
    if plan.num_experts > MOST_EXPERTS:
        reasons.append(f"it takes at most {MOST_EXPERTS} experts; got {plan.num_experts}")
    return [*reasons, *counting_reasons(plan)]


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
        tiles, sides = fused_tiles(purpose, target.architecture, dtype), Sides.of(dims, transposed)
        if best_tile(tiles, sides, 1.0, dtype.itemsize, target.shared_memory, purpose) is None:
            reasons.append(f"no {purpose} tile fits bonds {dims.a} and {dims.b} on {target.architecture}")
    return list(dict.fromkeys(reasons))
