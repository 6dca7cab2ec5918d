"""Triton kernels for NVIDIA and AMD GPUs; on the CPU only in Triton's interpreter, for tests.

Importing this package does not import Triton: a kernel's module is imported when the kernel is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch

from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear.triton.cost import (
    ON_CHIP,
    ON_CHIP_FROM_HALF,
    WIDE,
    contraction_reasons,
    ways_here,
)
from mpoe_kernels.registry import Backend, Candidate, Request
from mpoe_kernels.triton.architecture import (
    NO_LIMIT,
    architecture_of,
    gpu_available,
    in_interpreter,
    shared_memory_of,
    triton_reasons,
)

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
    "mpo_embedding": ("embedding.triton", "forward"),
    "mpo_embedding_backward": ("embedding.triton", "backward"),
}


def _call(module: str, function: str, *arguments: Any, **options: Any) -> Any:
    return getattr(import_module(f"mpoe_kernels.{module}"), function)(*arguments, **options)


# Name of a candidate -> function of the module ``linear`` and its options.
_WAYS: dict[str, tuple[str, dict[str, bool]]] = {
    WIDE: ("by_steps", {"wide": True}),
    ON_CHIP: ("on_chip", {"half": False}),
    ON_CHIP_FROM_HALF: ("on_chip", {"half": True}),
}


def candidates(plan: Contraction) -> list[Candidate]:
    """The candidates: step by step, and the fused kernels."""
    found = []
    for name in ways_here(plan):
        function, options = _WAYS.get(name, ("by_steps", {}))
        run = partial(_call, "linear.triton.kernels", f"{plan.phase}_{function}", **options)
        found.append(Candidate("triton", name, plan.strategy, run))
    return found


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
    device = torch.device(request.device)
    limit = shared_memory_of(device)
    if limit == NO_LIMIT or (needed := _least_shared_bytes(architecture_of(device), request.dtype)) <= limit:
        return []
    return [f"its smallest tile needs {needed} bytes of shared memory; the device has {limit}"]


@lru_cache(maxsize=64)
def _least_shared_bytes(architecture: str, dtype: torch.dtype) -> int:
    return import_module("mpoe_kernels.linear.triton.configs").least_shared_bytes(architecture, dtype)


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
