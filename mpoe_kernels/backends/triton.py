"""Triton kernels for NVIDIA and AMD GPUs; on the CPU only in Triton's interpreter, for tests.

Importing this package does not import Triton: a kernel's module is imported when the kernel is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch

from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.triton.reasons import contraction_reasons, fused_reasons
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import NO_LIMIT, gpu_available, in_interpreter, triton_reasons

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# op -> module and function
_KERNELS = {
    "route": ("routing.triton", "route"),
    "dispatch": ("routing.triton", "dispatch"),
    "dispatch_backward": ("routing.triton", "dispatch_backward"),
    "combine": ("routing.triton", "combine"),
    "combine_backward": ("routing.triton", "combine_backward"),
    "hidden_experts": ("hidden_experts.triton.launch", "forward"),
    "hidden_experts_backward": ("hidden_experts.triton.launch", "backward"),
}


def _call(module: str, function: str, *arguments: Any, **options: Any) -> Any:
    return getattr(import_module(f"mpoe_kernels.{module}"), function)(*arguments, **options)


ON_CHIP = "rebuild on chip"  # name of the candidate whose weights stay on chip


def candidates(plan: Contraction) -> list[Candidate]:
    """The candidates: with weights kept on chip where they fit, and step by step."""
    names = {plan.strategy: "by_steps"}
    target = architecture.target_of(torch.device(plan.device))
    if plan.strategy == "rebuild" and not fused_reasons(plan.dims, plan.dtype, target):
        names = {ON_CHIP: "on_chip", **names}
    module = "linear.triton.kernels"
    return [
        Candidate("triton", name, plan.strategy, partial(_call, module, f"{plan.phase}_{way}"))
        for name, way in names.items()
    ]


def unavailable_reasons() -> list[str]:
    """Why no Triton kernel can run here."""
    reasons = list(triton_reasons())
    if not in_interpreter() and not gpu_available():
        reasons.append("it needs a CUDA or ROCm device (or Triton's interpreter: TRITON_INTERPRET=1)")
    return reasons


def request_reasons(request: Request) -> list[str]:
    """Why no Triton kernel can run a request."""
    reasons = []
    if request.device_type != "cuda" and not (request.device_type == "cpu" and in_interpreter()):
        reasons.append(f"it runs on cuda, not on {request.device_type} (without TRITON_INTERPRET=1)")
    if request.op == "route":  # integers only, and no tiles
        return reasons
    if request.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        return [*reasons, f"it computes in {names}, not in {str(request.dtype).removeprefix('torch.')}"]
    return reasons if reasons or triton_reasons() else _memory_reasons(request)


def _memory_reasons(request: Request) -> list[str]:
    """Reasons if the kernels' smallest tiles do not fit the device."""
    target = architecture.target_of(torch.device(request.device))
    limit = target.shared_memory
    if limit == NO_LIMIT or (needed := _least_shared_bytes(target.architecture, request.dtype)) <= limit:
        return []
    return [f"its smallest tile needs {needed} bytes of shared memory; the device has {limit}"]


@lru_cache(maxsize=64)
def _least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    return import_module("mpoe_kernels.linear.triton.configs").least_shared_bytes(name, dtype)


KERNELS: dict[str, Callable[..., Any]] = {op: partial(_call, *where) for op, where in _KERNELS.items()}

TRITON = Backend(
    name="triton",
    kernels=KERNELS,
    unavailable_reasons=unavailable_reasons,
    request_reasons=request_reasons,
    candidates=candidates,
    contraction_reasons=contraction_reasons,
    places_rows=True,
)
