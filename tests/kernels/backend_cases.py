"""The backends that tests of the ops run on, and the dtypes in which each is compared with the float64 reference."""

from __future__ import annotations

import os

import pytest
import torch

from mpoe_kernels import backend_reasons
from mpoe_kernels.backends.registry import Request, select

BACKENDS = ("eager", "native")
# float64 first: where a backend has it, gradients are checked by finite differences too.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def supports(backend: str, op: str, dtype: torch.dtype) -> bool:
    """Whether this backend has a CPU kernel of this op and dtype."""
    from mpoe_kernels import BackendError

    try:
        select(Request(op, "cpu", dtype), backend)
    except BackendError:
        return False
    return True


def dtypes_of(backend: str, op: str) -> list[torch.dtype]:
    return [dtype for dtype in DTYPES if supports(backend, op, dtype)]


def require(backend: str, op: str = "route", dtype: torch.dtype | None = None) -> None:
    """Skip a test whose backend is missing (``MPOE_REQUIRE_ALL``: fail), or which lacks this op or dtype."""
    reasons = backend_reasons()[backend]
    if reasons:
        message = f"backend {backend} cannot run here: {'; '.join(reasons)}"
        if os.environ.get("MPOE_REQUIRE_ALL"):
            pytest.fail(message)
        pytest.skip(message)
    if dtype is None and not dtypes_of(backend, op) and op != "route":
        pytest.skip(f"backend {backend} has no kernel for {op}")
    if dtype is not None and not supports(backend, op, dtype):
        pytest.skip(f"backend {backend} has no kernel for {op} in {dtype}")


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values one element further in memory: aligned to the element only."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    moved = storage[1:].view(tensor.shape)
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a tensor that is contiguous in no axis."""
    wide = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    moved = wide[..., 0]
    moved.copy_(tensor.detach())
    return moved.requires_grad_(tensor.requires_grad)
