"""Compiled CUDA kernels: private ``mpoe_cuda::`` ops from csrc/cuda, called by this table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from mpoe_kernels.cuda_library import RefusingOps, unavailable_reasons
from mpoe_kernels.linear.cuda.kernels import DTYPES, LinearKernels
from mpoe_kernels.linear.gpu.budget import counting_reasons
from mpoe_kernels.registry import Backend, Request
from mpoe_kernels.routing.cuda import RoutingKernels


def backend_of(
    name: str,
    ops: Any,
    device_type: str,
    shared_memory: Callable[[str], int],
    unavailable_reasons: Callable[[], list[str]],
) -> Backend:
    """The CUDA kernels as a backend.

    Args:
        name: name of the backend.
        ops: namespace of the compiled ops: those for a GPU, or, in tests, the emulated ones.
        device_type: device type of their tensors.
        shared_memory: bytes of shared memory that a block may use on a device.
        unavailable_reasons: see `Backend`.
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

    return Backend(
        name=name,
        kernels=RoutingKernels(ops).table(),
        unavailable_reasons=unavailable_reasons,
        request_reasons=request_reasons,
        candidates=partial(linear.candidates, name),
        contraction_reasons=counting_reasons,
        places_rows=True,
    )


def shared_memory(device: str) -> int:
    """Bytes of shared memory that a block may use on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


CUDA = backend_of(
    "cuda",
    torch.ops.mpoe_cuda,
    "cuda",
    shared_memory,
    unavailable_reasons,
)
