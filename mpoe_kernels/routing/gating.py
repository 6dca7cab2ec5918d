"""A router's native calls: top-k gating as a whole, its logits, its choice.

While decoding, the router's six ops of PyTorch take longer than the products of a layer's experts;
with many tokens in 16 bits, PyTorch copies them all to float32. These are no ops: what
differentiates, compiles or watches a call sees PyTorch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends import AUTO, BACKENDS, Request
from mpoe_kernels.contract import float32_mm
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


def can_route_natively(
    x: Tensor, weight: Tensor, backend: str | None = None, *others: Tensor | None
) -> bool:
    """Whether the native kernels may compute with tokens ``x [T, I]`` and a router's weight ``[E,
    I]``.

    Not on other devices, for another backend (asked for here or by `use_backend`), nor where a
    gradient, a compiler or a mode has a part in the call. ``others``: tensors that the call
    computes with besides.
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
    """Decide where `can_route_natively`; ``raw``: gates are probabilities, otherwise they sum to
    1."""
    x = dense("x", x)
    weight = dense("weight", weight)
    gating = new_gating(x, weight.shape[0], top_k)
    memory = [tensor.data_ptr() for tensor in (x, weight, *gating)]
    NATIVE_LIBRARY.functions.gating(*_names_and_sizes(x, weight), top_k, raw, *memory)
    return gating


def gating_on_gpu(
    x: Tensor, weight: Tensor, top_k: int, raw: bool, scale: float, backend: str | None = None
) -> Gating | None:
    """Decide for tokens ``x [T, I]`` in two launches of the backend ``triton``, with a backward;
    ``raw`` as in `native_gating`, gates times ``scale``.

    None where it cannot run or another backend is named, and where a compiler or a mode has a part
    in the call.
    """
    if torch.compiler.is_dynamo_compiling() or weight.shape[0] > MOST_GATED:
        return None
    requested = requested_backend(backend)
    if requested != "triton" and not (requested == AUTO and x.is_cuda):
        return None
    if weight.dtype not in _DTYPES or not is_plain_call((x, weight)):
        return None
    request = Request("gate", str(x.device), x.dtype)
    if BACKENDS["triton"].unsupported_reasons(request):
        return None
    if needs_gradients((x, weight)):
        return Gating(*_Gate.apply(x, weight, top_k, raw, scale))
    return _decided(x, weight, top_k, raw, scale)


def _decided(x: Tensor, weight: Tensor, top_k: int, raw: bool, scale: float) -> Gating:
    kernels = BACKENDS["triton"].kernels
    parts = kernels["router_logits"](x, weight)
    decided: Gating = kernels["gate"](parts, top_k, raw, scale)
    return decided


def gates_of(logits: Tensor, index: Tensor, raw: bool, scale: float) -> Tensor:
    """A softmax router's gates ``[T, K]`` of experts that were chosen, in PyTorch's operations."""
    gates = torch.softmax(logits, dim=-1).gather(-1, index)
    if not raw:
        total = gates.sum(-1, keepdim=True)
        if index.shape[1] == 1:
            total = gates.detach()
        gates = gates / total
    return gates * scale


class _Gate(torch.autograd.Function):
    """`Gating` from tokens and a router's weight. The copies that gradients need are made in the
    backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, top_k: int, raw: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, index, gates = _decided(x, weight, top_k, raw, scale)
        ctx.save_for_backward(x, weight, logits, index)
        ctx.rule = raw, scale
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return logits, index, gates

    @staticmethod
    def backward(
        ctx: Any, dlogits: Tensor | None, _: Tensor | None, dgates: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if dlogits is None and dgates is None:
            return (None,) * 5
        gradients = _gradients
        if torch.is_grad_enabled():
            gradients = _differentiable
        dx, dweight = gradients(
            ctx.saved_tensors, ctx.rule, dlogits, dgates, ctx.needs_input_grad[:2]
        )
        return dx, dweight, None, None, None


Gradients = tuple[Tensor | None, Tensor | None]


def _gradients(
    saved: tuple[Tensor, ...],
    rule: tuple[bool, float],
    dlogits: Tensor | None,
    dgates: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """Of tokens and weight, from those of logits and gates."""
    x, weight, logits, index = saved
    need_x, need_weight = needs
    in_parts = x.dtype == torch.bfloat16
    decided = Gating(logits, index, logits)
    grad = BACKENDS["triton"].kernels["gate_backward"](decided, dlogits, dgates, *rule, in_parts)
    dx = dweight = None
    if in_parts:  # products of 16 bits, without float32 copies of the tokens
        if need_x:  # of rounded numbers, as every gradient of such tokens
            nearest = grad[:, : len(weight)]
            dx = nearest @ weight.to(x.dtype)
        if need_weight:
            parts = float32_mm(grad.t(), x).view(3, *weight.shape)
            dweight = parts.sum(0).to(weight.dtype)
        return dx, dweight
    if need_x:
        product = grad @ weight.float()
        dx = product.to(x.dtype)
    if need_weight:
        product = grad.t() @ x.float()
        dweight = product.to(weight.dtype)
    return dx, dweight


def _differentiable(
    saved: tuple[Tensor, ...],
    rule: tuple[bool, float],
    dlogits: Tensor | None,
    dgates: Tensor | None,
    needs: Sequence[bool],
) -> Gradients:
    """The same in PyTorch's operations, where somebody differentiates the gradients."""
    x, weight, _, index = saved
    need_x, need_weight = needs
    logits = x.float() @ weight.float().t()
    outputs = []
    grads = []
    if dlogits is not None:
        outputs.append(logits)
        grads.append(dlogits)
    if dgates is not None:
        outputs.append(gates_of(logits, index, *rule))
        grads.append(dgates)
    if not need_x:
        (dweight,) = torch.autograd.grad(outputs, weight, grads, create_graph=True)
        return None, dweight
    if not need_weight:
        (dx,) = torch.autograd.grad(outputs, x, grads, create_graph=True)
        return dx, None
    dx, dweight = torch.autograd.grad(outputs, (x, weight), grads, create_graph=True)
    return dx, dweight


def _names_and_sizes(x: Tensor, weight: Tensor) -> tuple[str, str, tuple[int, ...]]:
    return name_of(x.dtype), name_of(weight.dtype), (*x.shape, weight.shape[0])


def native_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 arithmetic, ``[T, E]``, where `can_route_natively`."""
    x = dense("x", x)
    weight = dense("weight", weight)
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    memory = (x.data_ptr(), weight.data_ptr(), logits.data_ptr())
    NATIVE_LIBRARY.functions.router_logits(*_names_and_sizes(x, weight), *memory)
    return logits


def best_experts(scores: Tensor, top_k: int, backend: str | None = None) -> Tensor:
    """Experts with the largest of scores ``[T, E]``, best first, int64 ``[T, K]``; NaN counts as
    the largest.

    `torch.topk` takes a tenth of the time of a layer's experts, so the native kernels choose where
    they may.
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
    NATIVE_LIBRARY.functions.best_experts(
        (*scores.shape, top_k), scores.data_ptr(), index.data_ptr()
    )
    return index
