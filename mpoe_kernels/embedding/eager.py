"""Rows of an MPO table: gathered through the cores, or from the rebuilt table when that costs less."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.indices import check_ids
from mpoe_kernels.linear.eager.weight import block_order, project_gradient, rebuild_weight
from mpoe_kernels.planner import BlockDims


def _gather_is_cheaper(dims: BlockDims, rows: int) -> bool:
    central = dims.jL * dims.a * dims.jC * dims.b
    right = dims.jL * dims.jC * dims.b * dims.jR
    return rows * 2 * (central + right) <= dims.rebuild_flops


def _digits(ids: Tensor, dims: BlockDims) -> tuple[Tensor, Tensor, Tensor]:
    """Row number -> indices ``(iL, iC, iR)``."""
    return ids // (dims.iC * dims.iR), ids // dims.iR % dims.iC, ids % dims.iR


def _central_step(rows_left: Tensor, central: Tensor, centre_digit: Tensor) -> Tensor:
    """``[n, jL, a]`` times the slice of the central core that each row needs -> ``[n, jL jC, b]``."""
    n, columns, a = rows_left.shape
    out = rows_left.new_empty(n, columns, central.shape[2] * central.shape[3])
    for digit in range(central.shape[1]):
        rows = (centre_digit == digit).nonzero().squeeze(1)
        if rows.numel():
            product = rows_left[rows].reshape(-1, a) @ central[:, digit].reshape(a, -1)
            out[rows] = product.view(rows.numel(), columns, -1)
    return out.view(n, columns * central.shape[2], central.shape[3])


def embedding_forward(
    ids: Tensor, left: Tensor, central: Tensor, right: Tensor, num_embeddings: int, embedding_dim: int
) -> Tensor:
    """``[T] -> [T, embedding_dim]``."""
    dims = BlockDims.of_blocks(left, central, right, num_embeddings, embedding_dim)
    if ids.device.type == "cpu":  # elsewhere the check would wait for the device
        check_ids(ids, num_embeddings)
    if not _gather_is_cheaper(dims, ids.numel()):
        return rebuild_weight(left[0], central, right[0], dims).index_select(0, ids)
    left_digit, centre_digit, right_digit = _digits(ids, dims)
    half = _central_step(left[0, left_digit], central, centre_digit)
    rows = torch.bmm(half, right[0].transpose(0, 1)[right_digit])
    return rows.view(ids.numel(), dims.jL * dims.jC * dims.jR)[:, :embedding_dim].contiguous()


def embedding_backward(
    grad: Tensor, ids: Tensor, left: Tensor, central: Tensor, right: Tensor, num_embeddings: int, embedding_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, central and right."""
    dims = BlockDims.of_blocks(left, central, right, num_embeddings, embedding_dim)
    if not _gather_is_cheaper(dims, ids.numel()):
        dtable = grad.new_zeros(num_embeddings, embedding_dim).index_add_(0, ids, grad)
        ordered = block_order(dtable, dims)
        dleft, dcentral, dright = project_gradient(ordered, left[0], central, right[0], dims, need_central=True)
        assert dcentral is not None
        return dleft.unsqueeze(0), dcentral, dright.unsqueeze(0)
    left_digit, centre_digit, right_digit = _digits(ids, dims)
    rows_left = left[0, left_digit]  # [T, jL, a]
    half = _central_step(rows_left, central, centre_digit)  # [T, jL jC, b]
    rows_right = right[0].transpose(0, 1)[right_digit]  # [T, b, jR]
    padded = torch.nn.functional.pad(grad, (0, dims.jL * dims.jC * dims.jR - embedding_dim))
    drows = padded.view(ids.numel(), dims.jL * dims.jC, dims.jR)
    dright = torch.zeros_like(right[0].transpose(0, 1).contiguous())
    dright.index_add_(0, right_digit, torch.bmm(half.transpose(1, 2), drows))
    dhalf = torch.bmm(drows, rows_right.transpose(1, 2)).view(ids.numel(), dims.jL, dims.jC * dims.b)
    dcentral = torch.zeros_like(central)
    drows_left = torch.zeros_like(rows_left)
    for digit in range(dims.iC):
        rows = (centre_digit == digit).nonzero().squeeze(1)
        if rows.numel():
            dpart = dhalf[rows].reshape(-1, dims.jC * dims.b)
            dcentral[:, digit] = (rows_left[rows].reshape(-1, dims.a).T @ dpart).view(dims.a, dims.jC, dims.b)
            drows_left[rows] = (dpart @ central[:, digit].reshape(dims.a, -1).T).view(-1, dims.jL, dims.a)
    dleft = torch.zeros_like(left)
    dleft[0].index_add_(0, left_digit, drows_left)
    return dleft, dcentral, dright.transpose(0, 1).unsqueeze(0).contiguous()
