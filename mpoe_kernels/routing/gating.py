"""A router's native calls: top-k gating as a whole, its logits, its choice.

While decoding, the router's six ops of PyTorch take longer than the products of a layer's experts; with many tokens in
16 bits, PyTorch copies them all to float32. These are no ops: what differentiates, compiles or watches a call sees
PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends import AUTO, BACKENDS, Request
from mpoe_kernels.define import is_plain_call, needs_gradients, requested_backend
from mpoe_kernels.native_library import NATIVE_LIBRARY, dense, name_of

MOST_GATED = 4096  # experts among which one launch chooses
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
        and x.shape[1:] == weight.shape[1:]
        and x.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and x.is_cpu
        and weight.is_cpu
        and requested_backend(backend) in (AUTO, "native")
        and is_plain_call((x, weight, *others))
        and not needs_gradients((x, weight, *others))
    )


def new_gating(x: Tensor, num_experts: int, top_k: int) -> Gating:
    """Memory for a decision about tokens ``x [T, I]``."""
    tokens = x.shape[0]
    return Gating(
        x.new_empty(tokens, num_experts, dtype=torch.float32),
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens, top_k, dtype=torch.float32),
    )


def native_gating(x: Tensor, weight: Tensor, top_k: int, raw: bool) -> Gating:
    """Decide where `can_route_natively`; ``raw``: gates are probabilities, otherwise they sum to 1."""
    arguments, _kept = _inputs(x, weight)
    found = new_gating(x, weight.shape[0], top_k)
    names_and_sizes, memory = arguments[:3], arguments[3:]
    NATIVE_LIBRARY.functions.gating(*names_and_sizes, top_k, raw, *memory, *[each.data_ptr() for each in found])
    return found


def gating_of(logits: Tensor, top_k: int, raw: bool, backend: str | None = None) -> Gating | None:
    """Decide from logits float32 ``[T, E]`` in one launch of the backend ``triton``; ``raw`` as in `native_gating`.

    None where it cannot run or another backend is named, and where a gradient, a compiler or a mode has a part in the
    call.
    """
    if logits.shape[1] > MOST_GATED:
        return None
    if torch.compiler.is_dynamo_compiling() or not is_plain_call((logits,)) or needs_gradients((logits,)):
        return None
    asked, on_gpu = requested_backend(backend), BACKENDS["triton"]
    request = Request("gate", str(logits.device), logits.dtype)
    if asked not in ((AUTO, "triton") if logits.is_cuda else ("triton",)) or on_gpu.unsupported_reasons(request):
        return None
    decided: Gating = on_gpu.kernels["gate"](logits, top_k, raw)
    return decided


def _inputs(x: Tensor, weight: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    """Dtypes, sizes and addresses, and the tensors that must live until the call returns."""
    x, weight = dense("x", x), dense("weight", weight)
    sizes = (*x.shape, weight.shape[0])
    return (name_of(x.dtype), name_of(weight.dtype), sizes, x.data_ptr(), weight.data_ptr()), (x, weight)


def native_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 arithmetic, ``[T, E]``, where `can_route_natively`."""
    arguments, _kept = _inputs(x, weight)
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    NATIVE_LIBRARY.functions.router_logits(*arguments, logits.data_ptr())
    return logits


def best_experts(scores: Tensor, top_k: int, backend: str | None = None) -> Tensor:
    """Experts with the largest of scores ``[T, E]``, best first, int64 ``[T, K]``; NaN counts as the largest.

    `torch.topk` takes a tenth of the time of a layer's experts, so the native kernels choose where they may.
    """
    scores = scores.detach()
    native = (
        not torch.compiler.is_dynamo_compiling()
        and NATIVE_LIBRARY.functions is not None
        and scores.is_cpu
        and scores.dtype == torch.float32
        and requested_backend(backend) in (AUTO, "native")
        and is_plain_call((scores,))
    )
    if not native:
        return scores.topk(top_k, dim=-1).indices
    scores = dense("scores", scores)
    index = scores.new_empty(len(scores), top_k, dtype=torch.int64)
    NATIVE_LIBRARY.functions.best_experts((*scores.shape, top_k), scores.data_ptr(), index.data_ptr())
    return index
