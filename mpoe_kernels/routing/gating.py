"""Top-k gating of few tokens in one call: logits, best experts and their gates.

While decoding, the router's six ops of PyTorch take longer than the products of a layer's experts. This is no op: what
differentiates, compiles or watches a call sees PyTorch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.define import is_plain_call, needs_gradients
from mpoe_kernels.native_library import DTYPES, NATIVE_LIBRARY, GatingArguments, call_native
from mpoe_kernels.registry import AUTO, requested_backend

# Logits at most, of up to FEW_EXPERTS and of more, whose products PyTorch's library computes faster. On a thread of an
# EPYC, 768 features: 8 experts .8 of PyTorch's time with 64 and 512 tokens; 64 experts 1.0 with 4 tokens, 1.5 with 16.
MOST_LOGITS, MOST_LOGITS_OF_MANY, FEW_EXPERTS = 4096, 256, 8
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


def can_gate_natively(x: Tensor, weight: Tensor, backend: str | None = None, *others: Tensor | None) -> bool:
    """Whether the native kernel may decide on tokens ``x [T, I]`` by a router's weight ``[E, I]``.

    Not on other devices, for many tokens, for another backend (asked for here or by `use_backend`), nor where a
    gradient, a compiler or a mode has a part in the call. ``others``: tensors that the call computes with besides.
    """
    return (
        not torch.compiler.is_dynamo_compiling()
        and NATIVE_LIBRARY.functions is not None
        and x.dim() == weight.dim() == 2
        and x.shape[1] == weight.shape[1]
        and x.shape[0] * weight.shape[0] <= (MOST_LOGITS if weight.shape[0] <= FEW_EXPERTS else MOST_LOGITS_OF_MANY)
        and x.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and x.is_cpu
        and weight.is_cpu
        and requested_backend(backend) in (AUTO, "native")
        and is_plain_call((x, weight, *others))
        and not needs_gradients((x, weight, *others))
    )


def arguments_of(x: Tensor, weight: Tensor, top_k: int, raw: bool) -> tuple[GatingArguments, Gating]:
    """What the library is called with for dense tensors, and where it writes."""
    (tokens, features), experts = x.shape, weight.shape[0]
    found = Gating(
        x.new_empty((tokens, experts), dtype=torch.float32),
        x.new_empty((tokens, top_k), dtype=torch.int64),
        x.new_empty((tokens, top_k), dtype=torch.float32),
    )
    names, sizes = (DTYPES[x.dtype], DTYPES[weight.dtype]), (tokens, features, experts, top_k, raw)
    return GatingArguments(*names, *sizes, x.data_ptr(), weight.data_ptr(), *(each.data_ptr() for each in found)), found


def native_gating(x: Tensor, weight: Tensor, top_k: int, raw: bool) -> Gating:
    """Decide where `can_gate_natively`; ``raw``: gates are probabilities, otherwise they sum to 1."""
    x, weight = x.contiguous(), weight.contiguous()
    arguments, found = arguments_of(x, weight, top_k, raw)
    call_native("mpoe_gating", arguments)
    return found
