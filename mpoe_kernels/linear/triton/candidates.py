"""Which contractions the Triton kernels can compute, and how. Nothing here imports Triton.

Triton computes ``rebuild`` with weights that stay on chip (`fused`) where their bonds allow, and every strategy product
by product with its own grouped products (`grouped`), which need not wait for the GPU in any dtype.
"""

from __future__ import annotations

import torch

from mpoe_kernels.backends import Candidate, lazily
from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.grouped import counting_reasons
from mpoe_kernels.linear.triton.fused_tiles import MOST_BOND, Sides, best_tile, shipped_fused
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import Target

MOST_EXPERTS = 4096  # every program scans the offsets at once
ON_CHIP = "rebuild on chip"  # name of the candidate whose weights stay on chip
_FUSED = lazily("mpoe_kernels.linear.triton.fused_launch", "forward", "backward")
_GROUPED = lazily("mpoe_kernels.linear.triton.grouped", "forward", "backward")


def candidates(plan: Contraction) -> list[Candidate]:
    """With weights kept on chip where they fit, and product by product."""
    ways = {plan.strategy: _GROUPED}
    target = architecture.target_of(torch.device(plan.device))
    if plan.strategy == "rebuild" and not fused_reasons(plan.dims, plan.dtype, target):
        ways = {ON_CHIP: _FUSED, **ways}
    return [Candidate("triton", name, plan.strategy, getattr(way, plan.phase)) for name, way in ways.items()]


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
        tiles, sides = shipped_fused(purpose, target.architecture, dtype), Sides.of(dims, transposed)
        if best_tile(tiles, sides, 1.0, dtype.itemsize, target.shared_memory, purpose) is None:
            reasons.append(f"no {purpose} tile fits bonds {dims.a} and {dims.b} on {target.architecture}")
    return list(dict.fromkeys(reasons))
