"""What the Triton kernels can compute, and how long they are predicted to take. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.linear.gpu.cost import TRITON, counting_reasons, gpu_seconds
from mpoe_kernels.linear.triton.fused_cost import fused_seconds
from mpoe_kernels.planner import HARDWARE, Contraction, Hardware, hardware_here
from mpoe_kernels.registry import Request
from mpoe_kernels.triton.architecture import HARDWARE_NAMES, Target, in_interpreter, target_of

MOST_EXPERTS = 4096  # every program scans the offsets at once
INTERPRETER_SECONDS = 1e6  # the interpreter is for tests: never chosen unless named


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the Triton kernels cannot compute a contraction."""
    reasons = []
    if plan.num_experts > MOST_EXPERTS:
        reasons.append(f"it takes at most {MOST_EXPERTS} experts; got {plan.num_experts}")
    return [*reasons, *counting_reasons(plan)]


# Ways to compute ``rebuild`` whose weights never leave the multiprocessor; the second makes left · central beforehand.
ON_CHIP, ON_CHIP_FROM_HALF = "rebuild on chip", "rebuild on chip from LC"


def ways(plan: Contraction, target: Target, hardware: Hardware) -> dict[str, float]:
    """Predicted seconds of every way to compute a contraction on a GPU, by name."""
    found = {plan.strategy: gpu_seconds(plan, hardware, TRITON)}
    for name, half in ((ON_CHIP, False), (ON_CHIP_FROM_HALF, True)):
        if (seconds := fused_seconds(plan, target, hardware, half)) < float("inf"):
            found[name] = seconds
    return found


def ways_here(plan: Contraction) -> dict[str, float]:
    """`ways` on the plan's device; in the interpreter as on the GPU that stands for it, but never cheap."""
    device = torch.device(plan.device)
    target = target_of(device)
    if plan.device_type == "cuda" and not in_interpreter():
        return ways(plan, target, hardware_here(plan.device))
    found = ways(plan, target, HARDWARE[HARDWARE_NAMES[target.architecture]])
    return {name: INTERPRETER_SECONDS + seconds for name, seconds in found.items()}


def predicted_cost(request: Request) -> float:
    """Half of eager's on a GPU: one launch where PyTorch needs several."""
    return INTERPRETER_SECONDS if request.device_type != "cuda" or in_interpreter() else 0.5
