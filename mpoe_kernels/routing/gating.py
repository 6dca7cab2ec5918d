"""A router's native calls: top-k gating as a whole, and its logits with their gradients.

While decoding, the router's six ops of PyTorch take longer than the products of a layer's experts; with many tokens in
16 bits, PyTorch copies them all to float32. These are no ops: what differentiates, compiles or watches a call sees
PyTorch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.define import is_plain_call, needs_gradients
from mpoe_kernels.native_library import DTYPES, NATIVE_LIBRARY, RouterArguments, call_native
from mpoe_kernels.registry import AUTO, requested_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Gating(NamedTuple):
    """What a softmax router decides.

    Attributes:
        logits: float32 ``[T, E]``.
        top_k_index: int64 ``[T, K]``, best expert first.
        top_k_weights: gates, float32 ``[T, K]``.
    """

    logits: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


def can_route_natively(x: Tensor, weight: Tensor, backend: str | None = None, *others: Tensor | None) -> bool:
    """Whether the native kernels may compute with tokens ``x [T, I]`` and a router's weight ``[E, I]``.

    Not on other devices, for another backend (asked for here or by `use_backend`), nor where a gradient, a compiler or
    a mode has a part in the call. ``others``: tensors that the call computes with besides.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and NATIVE_LIBRARY.functions is not None
        and x.dim() == weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and x.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and x.is_cpu
        and weight.is_cpu
        and requested_backend(backend) in (AUTO, "native")
        and is_plain_call((x, weight, *others))
        and not needs_gradients((x, weight, *others))
    )


def arguments_of(x: Tensor, weight: Tensor, top_k: int, raw: bool) -> tuple[RouterArguments, Gating]:
    """What the library is called with for dense tensors, and where it writes."""
    (tokens, features), experts = x.shape, weight.shape[0]
    found = Gating(
        x.new_empty((tokens, experts), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.int64),
        x.new_empty((tokens, top_k), dtype=torch.float32),
    )
    names, sizes = (DTYPES[x.dtype], DTYPES[weight.dtype]), (tokens, features, experts, top_k, raw)
    return RouterArguments(*names, *sizes, x.data_ptr(), weight.data_ptr(), *(each.data_ptr() for each in found)), found


def native_gating(x: Tensor, weight: Tensor, top_k: int, raw: bool) -> Gating:
    """Decide where `can_route_natively`; ``raw``: gates are probabilities, otherwise they sum to 1."""
    x, weight = x.contiguous(), weight.contiguous()
    arguments, found = arguments_of(x, weight, top_k, raw)
    call_native("mpoe_gating", arguments)
    return found


def _logits_arguments(x: Tensor, weight: Tensor) -> RouterArguments:
    names, sizes = (DTYPES[x.dtype], DTYPES[weight.dtype]), (*x.shape, weight.shape[0])
    return RouterArguments(*names, *sizes, x=x.data_ptr(), weight=weight.data_ptr())


def native_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 arithmetic, ``[T, E]``, where `can_route_natively`."""
    x, weight = x.contiguous(), weight.contiguous()
    logits = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32)
    arguments = _logits_arguments(x, weight)
    arguments.logits = logits.data_ptr()
    call_native("mpoe_router_logits", arguments)
    return logits


def native_logits_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of ``x`` and ``weight``, each if needed, where `can_route_natively` and neither is float16."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    dx, dweight = (torch.empty_like(each) if wanted else None for each, wanted in zip((x, weight), need, strict=True))
    arguments = _logits_arguments(x, weight)
    arguments.grad = grad.data_ptr()
    arguments.dx = None if dx is None else dx.data_ptr()
    arguments.dweight = None if dweight is None else dweight.data_ptr()
    call_native("mpoe_router_logits_backward", arguments)
    return dx, dweight
