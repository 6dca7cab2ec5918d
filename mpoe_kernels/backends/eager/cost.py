"""What the eager kernels can compute, and how long they are predicted to take."""

from __future__ import annotations

from mpoe_kernels.planner import Contraction, hardware_here

IMPLEMENTED = ("rebuild", "chain", "separable")


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the eager kernels cannot compute a contraction."""
    if plan.strategy not in IMPLEMENTED:
        return [f"it has no kernel for the strategy {plan.strategy!r}"]
    return []


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the eager kernels."""
    return plan.seconds(hardware_here(plan.device_type))
