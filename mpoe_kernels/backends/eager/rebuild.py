"""Rebuild strategy: one expert's weight at a time, then dense GEMMs. At most two weights' worth of temporaries live."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.grouped import active_groups
from mpoe_kernels.planner import BlockDims


def rebuild_weight(left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> Tensor:
    """One expert's ``[I, F]`` from ``left [iL, jL, a]``, ``central [a, iC, jC, b]``, ``right [b, iR, jR]``."""
    if dims.left_first:
        half = left.reshape(-1, dims.a) @ central.reshape(dims.a, -1)
        full = half.view(-1, dims.b) @ right.reshape(dims.b, -1)
    else:
        half = central.reshape(-1, dims.b) @ right.reshape(dims.b, -1)
        full = left.reshape(-1, dims.a) @ half.view(dims.a, -1)
    del half
    full = full.view(dims.iL, dims.jL, dims.iC, dims.jC, dims.iR, dims.jR).permute(0, 2, 4, 1, 3, 5)
    padded = full.reshape(dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR)
    return padded[: dims.in_features, : dims.out_features]


def block_order(dweight: Tensor, dims: BlockDims) -> Tensor:
    """``[I, F] -> [(iL jL iC jC), (iR jR)]``, the order in which the blocks multiply."""
    padded_in, padded_out = dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
    if (padded_in, padded_out) != (dims.in_features, dims.out_features):
        dweight = torch.nn.functional.pad(dweight, (0, padded_out - dims.out_features, 0, padded_in - dims.in_features))
    ordered = dweight.view(dims.iL, dims.iC, dims.iR, dims.jL, dims.jC, dims.jR).permute(0, 3, 1, 4, 2, 5)
    return ordered.reshape(-1, dims.iR * dims.jR)


def project_gradient(
    ordered: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims, need_central: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of one expert's blocks from that of its weight: ``dleft``, ``dcentral`` (or None), ``dright``.

    Args:
        ordered: weight gradient as `block_order` returns it. Right is contracted first, so that the two remaining
            products are small.
    """
    left_matrix, central_matrix = left.reshape(-1, dims.a), central.reshape(dims.a, -1)
    half = (left_matrix @ central_matrix).view(-1, dims.b)
    dright = (half.T @ ordered).view(dims.b, dims.iR, dims.jR)
    del half  # as large as the weight itself at full bonds
    dhalf = (ordered @ right.reshape(dims.b, -1).T).view(dims.iL * dims.jL, -1)  # [(iL jL), (iC jC b)]
    dleft = (dhalf @ central_matrix.T).view(dims.iL, dims.jL, dims.a)
    dcentral = (left_matrix.T @ dhalf).view(central.shape) if need_central else None
    return dleft, dcentral, dright


def _rows(x: Tensor, row_index: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if row_index is None else x.index_select(0, row_index[start:stop])


def rebuild_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
) -> Tensor:
    """Pre-activation without bias, ``[N, F]``; rows past the last offset are zero."""
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    z = x.new_empty(slots, dims.out_features)
    for e, start, stop in active_groups(offsets):
        weight = rebuild_weight(left[e], central, right[e], dims)
        torch.mm(_rows(x, row_index, start, stop), weight, out=z[start:stop])
        del weight
    z[offsets[-1] :] = 0
    return z


def rebuild_backward(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
    need_x: bool,
    need_left: bool,
    need_central: bool,
    need_right: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed.

    The weight is rebuilt again rather than saved; the central gradient is accumulated over experts in at least
    float32.
    """
    slots = grad.shape[0]
    dx = grad.new_empty(slots, dims.in_features) if need_x else None
    # Zeros, because experts without rows get no gradient.
    dleft = torch.zeros_like(left) if need_left else None
    dright = torch.zeros_like(right) if need_right else None
    accumulate = torch.promote_types(central.dtype, torch.float32)
    dcentral = torch.zeros(central.shape, dtype=accumulate, device=central.device) if need_central else None
    for e, start, stop in active_groups(offsets):
        rows = grad[start:stop]
        if dx is not None:
            weight = rebuild_weight(left[e], central, right[e], dims)
            torch.mm(rows, weight.T, out=dx[start:stop])
            del weight
        if not (need_left or need_central or need_right):
            continue
        ordered = block_order(_rows(x, row_index, start, stop).T @ rows, dims)
        dleft_e, dcentral_e, dright_e = project_gradient(ordered, left[e], central, right[e], dims, need_central)
        del ordered
        if dleft is not None:
            dleft[e] = dleft_e
        if dcentral is not None and dcentral_e is not None:
            dcentral += dcentral_e
        if dright is not None:
            dright[e] = dright_e
    if dx is not None:
        dx[offsets[-1] :] = 0
    return dx, dleft, None if dcentral is None else dcentral.to(central.dtype), dright
