"""What the Triton kernels can compute, and how long they are predicted to take. Nothing here imports Triton."""

from __future__ import annotations

import torch

from mpoe_kernels.linear.triton.fused_cost import fused_seconds
from mpoe_kernels.planner import HARDWARE, Contraction, Hardware, hardware_here
from mpoe_kernels.planner.orders import INDICES, BlockDims, applications, recipe
from mpoe_kernels.registry import Request
from mpoe_kernels.triton.architecture import HARDWARE_NAMES, Target, in_interpreter, target_of

MOST_EXPERTS = 4096  # every program scans the offsets at once
LARGEST_INDEX = 2**31 - 1  # rows and columns are counted in 32 bits, addresses in 64
INTERPRETER_SECONDS = 1e6  # the interpreter is for tests: never chosen unless named


def experts_at_once(dims: BlockDims, built: tuple[str, ...]) -> int:
    """Experts whose built weights, and as many gradients, fit two whole weights; 0: nothing is built."""
    if not built:
        return 0
    return max(1, dims.weight_elements // max(dims.elements(INDICES[name]) for name in built))


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the Triton kernels cannot compute a contraction."""
    reasons = []
    if plan.num_experts > MOST_EXPERTS:
        reasons.append(f"it takes at most {MOST_EXPERTS} experts; got {plan.num_experts}")
    rows = max((step.m * plan.slots for step in applications(plan.dims, plan.order)), default=0)
    if rows > LARGEST_INDEX:
        reasons.append(f"strategy {plan.strategy!r} would count {rows} rows; it counts to {LARGEST_INDEX}")
    if plan.dims.weight_elements > LARGEST_INDEX:
        reasons.append(f"a weight of {plan.dims.weight_elements} elements is too large; at most {LARGEST_INDEX}")
    return reasons


def launches(plan: Contraction) -> int:
    """Kernel launches: every step once for each group of experts whose built weights fit."""
    merges, _ = recipe(plan.dims, plan.strategy)
    group = experts_at_once(plan.dims, tuple(result for result, _, _ in merges))
    return len(plan.steps) * (-(-plan.num_experts // group) if group else 1)


def gpu_seconds(plan: Contraction, hardware: Hardware) -> float:
    """The planner's roofline, which launches every step once, and the launches beyond that."""
    return plan.seconds(hardware) + (launches(plan) - len(plan.steps)) * hardware.launch_seconds


# Ways to compute ``rebuild`` whose weights never leave the multiprocessor; the second makes left · central beforehand.
ON_CHIP, ON_CHIP_FROM_HALF = "rebuild on chip", "rebuild on chip from LC"


def ways(plan: Contraction, target: Target, hardware: Hardware) -> dict[str, float]:
    """Predicted seconds of every way to compute a contraction on a GPU, by name."""
    found = {plan.strategy: gpu_seconds(plan, hardware)}
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
