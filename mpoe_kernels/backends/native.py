"""Compiled CPU kernels: functions of the library of csrc/, called by this table."""

from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.native import contraction_reasons, linear_backward, linear_forward
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.routing.native import ROUTING_KERNELS


def candidates(plan: Contraction) -> list[Candidate]:
    """One candidate for every strategy."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    return [Candidate("native", plan.strategy, plan.strategy, run)]


def unavailable_reasons() -> list[str]:
    """Why no native kernel can run here."""
    return list(NATIVE_LIBRARY.reasons)


def request_reasons(request: Request) -> list[str]:
    """Native kernels are for CPU tensors."""
    return [] if request.device_type == "cpu" else [f"it runs on cpu, not on {request.device_type}"]


NATIVE = Backend(
    name="native",
    kernels=ROUTING_KERNELS,
    unavailable_reasons=unavailable_reasons,
    request_reasons=request_reasons,
    candidates=candidates,
    contraction_reasons=contraction_reasons,
)
