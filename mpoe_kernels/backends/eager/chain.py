"""Chain strategy: contract activations with left (per expert), central (all slots at once), right (per expert).

Serves every shape. For a separable one (``jL = iR = 1``) the three steps are small GEMMs around one dense GEMM, no
weight is rebuilt, and the central step's result is saved for backward; otherwise everything is recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.grouped import grouped_mm, grouped_outer
from mpoe_kernels.planner import BlockDims


def _gather_rows(x: Tensor, row_index: Tensor | None, dims: BlockDims) -> Tensor:
    """Rows as ``[N * iC * iR, iL]``: the gather and the transposition are one copy."""
    padded = dims.iL * dims.iC * dims.iR
    if padded != dims.in_features:
        x = torch.nn.functional.pad(x, (0, padded - dims.in_features))
    turned = x.view(-1, dims.iL, dims.iC * dims.iR).transpose(1, 2)
    turned = turned.contiguous() if row_index is None else turned[row_index]
    return turned.reshape(-1, dims.iL)


def _left_weights(left: Tensor) -> Tensor:
    """``[E, iL, (jL a)]``."""
    return left.reshape(left.shape[0], left.shape[1], -1)


def _central_weight(central: Tensor) -> Tensor:
    """``[(iC a), (jC b)]``."""
    a, rows, columns, b = central.shape
    return central.transpose(0, 1).reshape(rows * a, columns * b)


def _right_weights(right: Tensor) -> Tensor:
    """``[E, (iR b), jR]``."""
    return right.transpose(1, 2).reshape(right.shape[0], -1, right.shape[3])


def _to_central(t: Tensor, dims: BlockDims) -> Tensor:
    """``[N, iC, iR, jL, a] -> [N iR jL, (iC a)]``; a view when separable."""
    t = t.view(-1, dims.iC, dims.iR, dims.jL, dims.a)
    return t.permute(0, 2, 3, 1, 4).reshape(-1, dims.iC * dims.a)


def _from_central(t: Tensor, dims: BlockDims) -> Tensor:
    """Inverse of `_to_central`, as ``[N iC iR, (jL a)]``."""
    t = t.view(-1, dims.iR, dims.jL, dims.iC, dims.a)
    return t.permute(0, 3, 1, 2, 4).reshape(-1, dims.jL * dims.a)


def _to_right(t: Tensor, dims: BlockDims) -> Tensor:
    """``[N, iR, jL, jC, b] -> [N jL jC, (iR b)]``; a view when separable."""
    t = t.view(-1, dims.iR, dims.jL, dims.jC, dims.b)
    return t.permute(0, 2, 3, 1, 4).reshape(-1, dims.iR * dims.b)


def _from_right(t: Tensor, dims: BlockDims) -> Tensor:
    """Inverse of `_to_right`, as ``[N iR jL, (jC b)]``."""
    t = t.view(-1, dims.jL, dims.jC, dims.iR, dims.b)
    return t.permute(0, 3, 1, 2, 4).reshape(-1, dims.jC * dims.b)


def _after_left(
    x: Tensor, left: Tensor, row_index: Tensor | None, offsets: list[int], dims: BlockDims
) -> tuple[Tensor, Tensor]:
    rows = _gather_rows(x, row_index, dims)
    return rows, _to_central(grouped_mm(rows, _left_weights(left), offsets, dims.iC * dims.iR), dims)


def chain_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
) -> tuple[Tensor, Tensor]:
    """``(z [N, F], h)``: pre-activation without bias, and the central step's result ``[N jL jC, (iR b)]``."""
    _, middle = _after_left(x, left, row_index, offsets, dims)
    h = _to_right(middle @ _central_weight(central), dims)
    z = grouped_mm(h, _right_weights(right), offsets, dims.jL * dims.jC)
    return z.view(-1, dims.jL * dims.jC * dims.jR)[:, : dims.out_features], h


def chain_backward(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    h: Tensor | None,
    dims: BlockDims,
    need_x: bool,
    need_left: bool,
    need_central: bool,
    need_right: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed."""
    padded_out = dims.jL * dims.jC * dims.jR
    if padded_out != dims.out_features:
        grad = torch.nn.functional.pad(grad, (0, padded_out - dims.out_features))
    grad_rows = grad.reshape(-1, dims.jR)
    central_weight, right_weights = _central_weight(central), _right_weights(right)
    if need_left or need_central or (need_right and h is None):
        rows, middle = _after_left(x, left, row_index, offsets, dims)
    else:
        rows = middle = x.new_empty(0)  # not read below
    dright = dcentral = dleft = dx = None
    if need_right:
        if h is None:
            h = _to_right(middle @ central_weight, dims)
        dright = grouped_outer(h, grad_rows, offsets, dims.jL * dims.jC)
        dright = dright.view(-1, dims.iR, dims.b, dims.jR).transpose(1, 2)
    if not (need_x or need_left or need_central):
        return None, None, None, dright
    dh = grouped_mm(grad_rows, right_weights.transpose(1, 2), offsets, dims.jL * dims.jC)
    dh = _from_right(dh, dims)
    if need_central:
        dcentral = (middle.T @ dh).view(dims.iC, dims.a, dims.jC, dims.b).transpose(0, 1)
    if need_x or need_left:
        dmiddle = _from_central(dh @ central_weight.T, dims)
        if need_left:
            dleft = grouped_outer(rows, dmiddle, offsets, dims.iC * dims.iR).view(left.shape)
        if need_x:
            drows = grouped_mm(dmiddle, _left_weights(left).transpose(1, 2), offsets, dims.iC * dims.iR)
            turned = drows.view(-1, dims.iC * dims.iR, dims.iL).transpose(1, 2)
            dx = turned.reshape(-1, dims.iL * dims.iC * dims.iR)[:, : dims.in_features]
    return dx, dleft, dcentral, dright
