"""Compiled CPU kernels: functions of the library of csrc/, called by this table."""

from mpoe_kernels.linear.native.cost import predicted_seconds
from mpoe_kernels.linear.native.kernels import contraction_reasons, linear_backward, linear_forward
from mpoe_kernels.linear.native.measure import measure
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.planner import Contraction
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.routing.native import ROUTING_KERNELS


def candidates(plan: Contraction) -> list[Candidate]:
    """One candidate for every strategy."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    return [Candidate("native", plan.strategy, plan.strategy, predicted_seconds(plan), run)]


def unavailable_reasons() -> list[str]:
    """Why no native kernel can run here."""
    return list(NATIVE_LIBRARY.reasons)


def request_reasons(request: Request) -> list[str]:
    """Native kernels are for CPU tensors."""
    return [] if request.device_type == "cpu" else [f"it runs on cpu, not on {request.device_type}"]


def predicted_cost(request: Request) -> float:
    """Cost of routing: below eager's, which is 1. On one thread of an AMD EPYC it took 1/1.2 to 1/30 of eager's time at
    every size and dtype tried (8 to 4096 slots of 768 or 3072 elements)."""
    return 0.5


NATIVE = Backend(
    name="native",
    kernels=ROUTING_KERNELS,
    unavailable_reasons=unavailable_reasons,
    request_reasons=request_reasons,
    predicted_cost=predicted_cost,
    candidates=candidates,
    contraction_reasons=contraction_reasons,
    same_on_any_threads=True,
    measure=measure,
)
