"""Compiled CUDA kernels: private ``mpoe_cuda::`` ops from csrc/cuda, called by this table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mpoe_kernels.cuda_library import RefusingOps, unavailable_reasons
from mpoe_kernels.linear.cuda.cost import gpu, predicted_cost
from mpoe_kernels.linear.cuda.kernels import DTYPES, LinearKernels
from mpoe_kernels.linear.gpu.cost import counting_reasons
from mpoe_kernels.planner import Contraction, Hardware
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.routing.cuda import RoutingKernels


def backend_of(
    name: str,
    ops: Any,
    device_type: str,
    hardware: Callable[[str], Hardware],
    unavailable_reasons: Callable[[], list[str]],
    predicted_cost: Callable[[Request], float],
    least_seconds: float = 0.0,
) -> Backend:
    """The CUDA kernels as a backend.

    Args:
        name: name of the backend.
        ops: namespace of the compiled ops: those for a GPU, or, in tests, the emulated ones.
        device_type: device type of their tensors.
        hardware: returns the numbers of a device, which determine the variant of a kernel.
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
    linear = LinearKernels(ops, hardware)

    def candidates(plan: Contraction) -> list[Candidate]:
        found = linear.candidates(name, plan)
        return [candidate._replace(seconds=least_seconds + candidate.seconds) for candidate in found]

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


CUDA = backend_of(
    "cuda",
    torch.ops.mpoe_cuda,
    "cuda",
    gpu,
    unavailable_reasons,
    predicted_cost,
)
