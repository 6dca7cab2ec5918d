"""Compiled CPU kernels: functions of the library of csrc/, called by this table."""

from collections.abc import Callable
from typing import Any

from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.embedding import eager as eager_embedding
from mpoe_kernels.embedding import native as embedding
from mpoe_kernels.linear.native.kernels import contraction_reasons, linear_backward, linear_forward
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.routing.native import ROUTING_KERNELS

KERNELS: dict[str, Callable[..., Any]] = {
    **ROUTING_KERNELS,
    "mpo_embedding": embedding.forward,
    "mpo_embedding_backward": eager_embedding.backward,
}


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
    kernels=KERNELS,
    unavailable_reasons=unavailable_reasons,
    request_reasons=request_reasons,
    op_reasons=dict.fromkeys(("mpo_embedding", "mpo_embedding_backward"), embedding.reasons),
    candidates=candidates,
    contraction_reasons=contraction_reasons,
)
