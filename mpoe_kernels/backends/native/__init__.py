"""Compiled CPU kernels: private ``mpoe_native::`` ops from csrc/, called by this table."""

from collections.abc import Callable
from typing import Any

from mpoe_kernels.backends.native.load import NATIVE_LIBRARY
from mpoe_kernels.backends.registry import Backend, Request

KERNELS: dict[str, Callable[..., Any]] = {}


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
)
