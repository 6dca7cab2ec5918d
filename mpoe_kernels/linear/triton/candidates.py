"""Which contractions the Triton kernels can compute, and how. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.backends import Candidate, lazily
from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.gpu.budget import counting_reasons
from mpoe_kernels.linear.triton.fused_tiles import MOST_BOND, Sides, best_tile, fused_tiles
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import Target

MOST_EXPERTS = 4096  # every program scans the offsets at once


ON_CHIP = "rebuild on chip"  # name of the candidate whose weights stay on chip
_PASSES = lazily(
    "mpoe_kernels.linear.triton.passes", "forward_by_steps", "forward_on_chip", "backward_by_steps", "backward_on_chip"
)


def candidates(plan: Contraction) -> list[Candidate]:
    """With weights kept on chip where they fit, and step by step."""
    names = {plan.strategy: "by_steps"}
    target = architecture.target_of(torch.device(plan.device))
    if plan.strategy == "rebuild" and not fused_reasons(plan.dims, plan.dtype, target):
        names = {ON_CHIP: "on_chip", **names}
    return [
        Candidate("triton", name, plan.strategy, getattr(_PASSES, f"{plan.phase}_{way}")) for name, way in names.items()
    ]


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
