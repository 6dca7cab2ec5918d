"""How many experts the kernels take at once, how many launches that makes, and what they cannot count."""

from __future__ import annotations

from mpoe_kernels.planner import Contraction, Hardware
from mpoe_kernels.planner.orders import INDICES, BlockDims, applications, recipe

LARGEST_INDEX = 2**31 - 1  # rows and columns are counted in 32 bits, addresses in 64


def experts_at_once(dims: BlockDims, built: tuple[str, ...], experts: int) -> int:
    """Experts whose weights are built at the same time; 0: nothing is built.

    What is alive at once, two composites of each of them, takes a quarter of what dense experts would take, or two
    whole weights where that is more. An operand's gradient counts for nothing: its value is not read any more by then.
    """
    if not built:
        return 0
    sizes = sorted((dims.elements(INDICES[name]) for name in built), reverse=True)
    fit_two_weights = dims.weight_elements // sizes[0]
    fit_a_quarter = experts * dims.weight_elements // 4 // sum(sizes[:2])
    return max(1, fit_two_weights, fit_a_quarter)


def counting_reasons(plan: Contraction) -> list[str]:
    """Why the kernels cannot count the rows or columns of a contraction."""
    reasons = []
    rows = max((step.m * plan.slots for step in applications(plan.dims, plan.order)), default=0)
    if rows > LARGEST_INDEX:
        reasons.append(f"strategy {plan.strategy!r} would count {rows} rows; it counts to {LARGEST_INDEX}")
    if plan.dims.weight_elements > LARGEST_INDEX:
        reasons.append(f"a weight of {plan.dims.weight_elements} elements is too large; at most {LARGEST_INDEX}")
    return reasons


def launches(plan: Contraction) -> int:
    """Kernel launches: every step once for each group of experts whose built weights fit."""
    merges, _ = recipe(plan.dims, plan.strategy)
    group = experts_at_once(plan.dims, tuple(result for result, _, _ in merges), plan.num_experts)
    return len(plan.steps) * (-(-plan.num_experts // group) if group else 1)


def gpu_seconds(plan: Contraction, hardware: Hardware) -> float:
    """The planner's roofline, which launches every step once, and the launches beyond that."""
    return plan.seconds(hardware) + (launches(plan) - len(plan.steps)) * hardware.launch_seconds
