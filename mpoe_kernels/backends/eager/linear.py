"""Grouped MPO linear: strategy, bias and activation around the kernels of the strategies."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.activation import Upstream, apply_activation_
from mpoe_kernels.backends.eager.rebuild import rebuild_backward, rebuild_forward
from mpoe_kernels.backends.eager.rows import rows_backward, rows_forward
from mpoe_kernels.planner import BlockDims


def linear_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    row_index: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y [N, F], h, z)``; ``h`` and ``z`` are empty unless backward will need them."""
    dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
    offsets = expert_offsets.tolist()
    h, saved = x.new_empty(0), x.new_empty(0)
    if strategy == "rebuild":
        z = rebuild_forward(x, left, central, right, offsets, row_index, dims)
    else:
        z, central_step = rows_forward(x, left, central, right, offsets, row_index, dims, strategy, save)
        if central_step is not None:
            h = central_step
    last = offsets[-1]
    if bias is not None:
        z[:last] += bias
    if save and activation not in ("none", "relu"):
        saved = z
    y = apply_activation_(activation, z)
    y[last:] = 0  # the activation of zero need not be zero
    return y.contiguous(), h, saved.contiguous()


def linear_backward(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    row_index: Tensor | None,
    h: Tensor,
    saved: Tensor,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``; ``need`` says which, the others are empty."""
    dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
    offsets = expert_offsets.tolist()
    need_x, need_left, need_central, need_right, need_bias = need
    upstream = Upstream(grad, activation, saved, need_bias)
    needs = (need_x, need_left, need_central, need_right)
    parts: tuple[Tensor | None, ...] = (None,) * 4
    if not any(needs):
        upstream.rows(0, offsets[-1])
    elif strategy == "rebuild":
        parts = rebuild_backward(upstream, x, left, central, right, offsets, row_index, dims, *needs)
    else:
        saved_h = h if strategy == "separable" else None
        parts = rows_backward(upstream, x, left, central, right, offsets, row_index, saved_h, dims, strategy, needs)
    dbias = None if upstream.bias is None else upstream.bias.to(grad.dtype)
    dx = parts[0]
    if dx is not None and row_index is not None:
        dx = torch.zeros_like(x).index_add_(0, row_index, dx)
    empty = grad.new_empty(0)
    results = [empty.clone() if part is None else part.contiguous() for part in (dx, *parts[1:], dbias)]
    return results[0], results[1], results[2], results[3], results[4]
