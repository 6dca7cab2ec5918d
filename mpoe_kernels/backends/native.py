"""Compiled CPU kernels: functions of the library of csrc/, called by this table."""

from collections.abc import Callable
from typing import Any

from mpoe_kernels.embedding import eager as eager_embedding
from mpoe_kernels.embedding import native as embedding
from mpoe_kernels.linear.native.cost import predicted_seconds
from mpoe_kernels.linear.native.kernels import contraction_reasons, linear_backward, linear_forward
from mpoe_kernels.linear.native.measure import measure
from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.planner import Contraction
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
    return [Candidate("native", plan.strategy, plan.strategy, predicted_seconds(plan), run)]


def unavailable_reasons() -> list[str]:
    """Why no native kernel can run here."""
    return list(NATIVE_LIBRARY.reasons)


def request_reasons(request: Request) -> list[str]:
    """Native kernels are for CPU tensors."""
    return [] if request.device_type == "cpu" else [f"it runs on cpu, not on {request.device_type}"]


def predicted_cost(request: Request) -> float:
    """Cost of routing and of the embedding: below eager's, which is 1. On one thread of an AMD EPYC routing took 1/1.2
    to 1/30 of eager's time at every size and dtype tried (8 to 4096 slots of 768 or 3072 elements); the embedding of 1
    to 512 rows was faster too, in four shapes, float32 and bfloat16."""
    return 0.5


NATIVE = Backend(
    name="native",
    kernels=KERNELS,
    unavailable_reasons=unavailable_reasons,
    request_reasons=request_reasons,
    op_reasons=dict.fromkeys(("mpo_embedding", "mpo_embedding_backward"), embedding.reasons),
    predicted_cost=predicted_cost,
    candidates=candidates,
    contraction_reasons=contraction_reasons,
    same_on_any_threads=True,
    measure=measure,
)
