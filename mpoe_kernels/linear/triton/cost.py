"""Capabilities and predicted times of the Triton kernels. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.linear.gpu.cost import (
    TRITON,
    TRITON_WIDE,
    counting_reasons,
    gated_seconds,
    gpu_seconds,
    multiply_seconds,
)
from mpoe_kernels.linear.triton.fused_cost import fused_seconds
from mpoe_kernels.planner import HARDWARE, Contraction, Hardware, hardware_here
from mpoe_kernels.registry import GatedPrice, Request
from mpoe_kernels.triton.architecture import HARDWARE_NAMES, INTERPRETER, Target, in_interpreter, target_of

MOST_EXPERTS = 4096  # every program scans the offsets at once
INTERPRETER_SECONDS = 1e6  # the interpreter is for tests: never chosen unless named


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


def ways(plan: Contraction, target: Target, hardware: Hardware) -> dict[str, float]:
    """Predicted seconds of every way to compute a contraction on a GPU, by name."""
    found = {plan.strategy: gpu_seconds(plan, hardware, TRITON)}
    if not wide_reasons(plan, target):
        found[WIDE] = gpu_seconds(plan, hardware, TRITON_WIDE)
    for name, half in ((ON_CHIP, False), (ON_CHIP_FROM_HALF, True)):
        if (seconds := fused_seconds(plan, target, hardware, half)) < float("inf"):
            found[name] = seconds
    return found


def _here(plan: Contraction) -> tuple[Target, Hardware, float]:
    """The plan's device and what each of its projections costs more; in the interpreter the GPU that stands for it."""
    target = target_of(torch.device(plan.device))
    if plan.device_type == "cuda" and not in_interpreter():
        return target, hardware_here(plan.device), 0.0
    return target, HARDWARE[HARDWARE_NAMES[target.architecture]], INTERPRETER_SECONDS


def ways_here(plan: Contraction) -> dict[str, float]:
    """`ways` on the plan's device; in the interpreter as on the GPU that stands for it, but never cheap."""
    target, hardware, more = _here(plan)
    return {name: more + seconds for name, seconds in ways(plan, target, hardware).items()}


def gated_price(plan: Contraction) -> GatedPrice:
    """Price of both projections of a gated network with the plan's steps, in launches of pairs."""
    _, hardware, more = _here(plan)
    price = gated_price_on(plan, hardware)
    return price._replace(together=2 * more + price.together)


def gated_price_on(plan: Contraction, hardware: Hardware) -> GatedPrice:
    """The same on any card."""
    return GatedPrice(gated_seconds(plan, hardware, TRITON), multiply_seconds(plan, hardware))


def predicted_cost(request: Request) -> float:
    """Half of eager's on a GPU: one launch where PyTorch needs several."""
    return INTERPRETER_SECONDS if request.device_type != "cuda" or in_interpreter() else 0.5
