"""Compiled CUDA kernels: private ``mpoe_cuda::`` ops from csrc/cuda, called by this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpoe_kernels.cuda_library import RefusingOps, unavailable_reasons
from mpoe_kernels.linear.cuda.kernels import DTYPES, LinearKernels
from mpoe_kernels.linear.gpu.cost import counting_reasons
from mpoe_kernels.planner import Contraction
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.routing.cuda import RoutingKernels


def backend_of(
    name: str,
    ops: Any,
    device_type: str,
    shared_memory: Callable[[str], int],
    unavailable_reasons: Callable[[], list[str]],
    predicted_cost: Callable[[Request], float],
    least_seconds: float = 0.0,
) -> Backend:
    """The CUDA kernels as a backend.

    Args:
        name: name of the backend.
        ops: namespace of the compiled ops: those for a GPU, or, in tests, the emulated ones.
        device_type: device type of their tensors.
        shared_memory: bytes of shared memory that a block may use on a device.
        unavailable_reasons, predicted_cost: see `Backend`.
        least_seconds: added to the predicted times, so that the backend is chosen only if it is named.
    """

    def request_reasons(request: Request) -> list[str]:
        reasons = []
        if request.device_type != device_type:
            reasons.append(f"it runs on {device_type}, not on {request.device_type}")
        if request.op != "route" and request.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            reasons.append(f"it computes in {names}, not in {str(request.dtype).removeprefix('torch.')}")
        return reasons

    ops = RefusingOps(ops)
    linear = LinearKernels(ops, shared_memory)

    def candidates(plan: Contraction) -> list[Candidate]:
        return linear.candidates(name, plan, least_seconds + plan.flops * 1e-15)

    return Backend(
        name=name,
        kernels=RoutingKernels(ops).table(),
        unavailable_reasons=unavailable_reasons,
        request_reasons=request_reasons,
        predicted_cost=predicted_cost,
        candidates=candidates,
        contraction_reasons=counting_reasons,
        places_rows=True,
    )


def shared_memory(device: str) -> int:
    """Bytes of shared memory that a block may use on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def predicted_cost(request: Request) -> float:
    """Cost of routing: below Triton's, because it needs fewer launches. Cost of `hidden_experts`: equal to Triton's,
    which is registered first and so is preferred where it can run; both take as many launches, and no GPU has timed
    either."""
    return 0.5 if request.op.startswith("hidden_experts") else 0.4


CUDA = backend_of(
    "cuda",
    torch.ops.mpoe_cuda,
    "cuda",
    shared_memory,
    unavailable_reasons,
    predicted_cost,
)
