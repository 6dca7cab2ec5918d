"""Router logits in float32, without a float32 copy of the tokens where the device allows it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.routing.gating import can_route_natively, native_logits


def float32_logits(x: Tensor, weight: Tensor, backend: str | None = None) -> Tensor:
    """``x [T, I] weight^T [I, E]`` in float32 arithmetic, ``[T, E]``, whatever the dtypes.

    The backward saves x itself instead of a float32 copy. The forward makes no copy either on a GPU, where products of
    two 16-bit numbers are exact in float32, in which tensor cores accumulate them, nor in the native kernels; nor does
    the backward on a GPU for bfloat16.
    ``backend``: name of a kernel backend, or ``None``.
    """
    if x.dtype == torch.float32:
        return F.linear(x, weight.float())
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        logits: Tensor = _Logits.apply(x, weight, backend)
        return logits
    return _logits(x, weight, backend)


def _on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def _logits(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    if can_route_natively(x, weight, backend):
        return native_logits(x, weight)
    logits = logits_of_low_precision(x, weight) if _on_gpu(x) else None
    return F.linear(x.float(), weight.float()) if logits is None else logits


def logits_of_low_precision(x: Tensor, weight: Tensor) -> Tensor | None:
    """The same with 16-bit products, which PyTorch supports on GPUs; None for dtypes for which they are not as
    exact."""
    if x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    if (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32):
        parts = torch.mm(x, bfloat16_parts(weight).flatten(0, 1).t(), out_dtype=torch.float32)
        return parts.view(x.shape[0], 3, weight.shape[0]).sum(1)
    return None  # float16 cannot hold the last digits of a float32 weight


def bfloat16_parts(weight: Tensor) -> Tensor:
    """Three bfloat16 numbers ``[3, E, I]`` whose sum is the float32 one: each holds 8 of its 24 bits."""
    first = weight.bfloat16()
    rest = weight - first
    second = rest.bfloat16()
    return torch.stack([first, second, (rest - second).bfloat16()])


class _Logits(torch.autograd.Function):
    """The copies that gradients need are made in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
        return _logits(x, weight, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        dx = (grad @ weight.float()).to(x.dtype) if need_x else None
        if not need_weight:
            return dx, None, None
        if _on_gpu(x) and x.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            parts = torch.bmm(bfloat16_parts(grad).mT, x.expand(3, *x.shape), out_dtype=torch.float32)
            return dx, parts.sum(0).to(weight.dtype), None
        return dx, (grad.t() @ x.float()).to(weight.dtype), None
