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
    arguments, _kept = _inputs(x, weight)
    gating = new_gating(x, weight.shape[0], top_k)
    names_and_sizes = arguments[:3]
    memory = arguments[3:]
    NATIVE_LIBRARY.functions.gating(
        *names_and_sizes, top_k, raw, *memory, *[result.data_ptr() for result in gating]
    )
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
    on_gpu = BACKENDS["triton"]
    if requested not in ((AUTO, "triton") if x.is_cuda else ("triton",)) or not is_plain_call(
        (x, weight)
    ):
        return None
    if weight.dtype not in _DTYPES or on_gpu.unsupported_reasons(
        Request("gate", str(x.device), x.dtype)
    ):
        return None
    if needs_gradients((x, weight)):
        return Gating(*_Gate.apply(x, weight, top_k, raw, scale))
    return _decided(x, weight, top_k, raw, scale)


def _decided(x: Tensor, weight: Tensor, top_k: int, raw: bool, scale: float) -> Gating:
    kernels = BACKENDS["triton"].kernels
    decided: Gating = kernels["gate"](kernels["router_logits"](x, weight), top_k, raw, scale)
    return decided


def gates_of(logits: Tensor, index: Tensor, raw: bool, scale: float) -> Tensor:
    """A softmax router's gates ``[T, K]`` of experts that were chosen, in PyTorch's operations."""
    gates = torch.softmax(logits, dim=-1).gather(-1, index)
    if not raw:
        gates = gates / (gates.detach() if index.shape[1] == 1 else gates.sum(-1, keepdim=True))
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
        gradients = _differentiable if torch.is_grad_enabled() else _gradients
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
            dx = grad[:, : len(weight)] @ weight.to(x.dtype)
        if need_weight:
            dweight = float32_mm(grad.t(), x).view(3, *weight.shape).sum(0).to(weight.dtype)
        return dx, dweight
    if need_x:
        dx = (grad @ weight.float()).to(x.dtype)
    if need_weight:
        dweight = (grad.t() @ x.float()).to(weight.dtype)
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
    logits = x.float() @ weight.float().t()
    pairs = [(logits, dlogits), (gates_of(logits, index, *rule), dgates)]
    outputs, grads = zip(*[pair for pair in pairs if pair[1] is not None], strict=True)
    wanted = [value for value, needed in zip((x, weight), needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
    return next(gradients) if needs[0] else None, next(gradients) if needs[1] else None


def _inputs(x: Tensor, weight: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor, Tensor]]:
    """Dtypes, sizes and addresses, and the tensors that must live until the call returns."""
    x = dense("x", x)
    weight = dense("weight", weight)
    sizes = (*x.shape, weight.shape[0])
    return (name_of(x.dtype), name_of(weight.dtype), sizes, x.data_ptr(), weight.data_ptr()), (
        x,
        weight,
    )


def native_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T`` in float32 arithmetic, ``[T, E]``, where `can_route_natively`."""
    arguments, _kept = _inputs(x, weight)
    logits = x.new_empty(len(x), len(weight), dtype=torch.float32)
    NATIVE_LIBRARY.functions.router_logits(*arguments, logits.data_ptr())
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
