"""Capabilities of the Triton kernels. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear.gpu.cost import counting_reasons
from mpoe_kernels.linear.triton.fused_cost import can_fuse
from mpoe_kernels.triton.architecture import INTERPRETER, Target, target_of

MOST_EXPERTS = 4096  # every program scans the offsets at once


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the Triton kernels cannot compute a contraction."""
    reasons = []
    if plan.num_experts > MOST_EXPERTS:
        reasons.append(f"it takes at most {MOST_EXPERTS} experts; got {plan.num_experts}")
    return [*reasons, *counting_reasons(plan)]


# A way to compute ``rebuild``: weights are read by descriptors of the card's copy engine (TMA), in wide tiles.
WIDE = "rebuild by wide tiles"
WIDE_ARCHITECTURES = ("sm_90", "sm_100", INTERPRETER)


def by_descriptor(line_bytes: int) -> bool:
    """Whether a descriptor supports lines of this many bytes; every built weight meets its other requirements."""
    return line_bytes % 16 == 0


def wide_reasons(plan: Contraction, target: Target) -> list[str]:
    """Why wide tiles cannot be used for rows and rebuilt weights."""
    reasons = []
    if plan.strategy != "rebuild":
        reasons.append(f"strategy {plan.strategy!r} builds no whole weights")
    if target.architecture not in WIDE_ARCHITECTURES:
        reasons.append(f"{target.architecture} has no descriptors; {', '.join(WIDE_ARCHITECTURES[:2])} have")
    if plan.dtype.itemsize != 2:
        reasons.append("the tiles are for elements of 2 bytes")
    columns = plan.dims.jL * plan.dims.jC * plan.dims.jR
    if not by_descriptor(columns * plan.dtype.itemsize):
        reasons.append(f"a line of {columns} elements is no multiple of 16 bytes")
    return reasons


# Ways to compute ``rebuild`` with weights that stay on chip; the second computes left · central beforehand.
ON_CHIP, ON_CHIP_FROM_HALF = "rebuild on chip", "rebuild on chip from LC"


def ways_here(plan: Contraction) -> list[str]:
    """Names of the ways to compute a contraction on the plan's device; in the interpreter on the GPU it stands for."""
    target = target_of(torch.device(plan.device))
    found = [plan.strategy]
    if not wide_reasons(plan, target):
        found.append(WIDE)
    fused = (ON_CHIP, False), (ON_CHIP_FROM_HALF, True)
    return found + [name for name, half in fused if can_fuse(plan, target, half)]
