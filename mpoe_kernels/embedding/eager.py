"""Rows of an MPO table.

Row number = (iL, iC, iR). For few rows, the row of left selected by iL is multiplied by the slice
of the central block selected by iC, then by the slice of right selected by iR. For many rows the
table is rebuilt. In einsums, i j, k m and l n are the digits of left, central and right, a and b
the bonds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpoe_kernels.checks import check_range
from mpoe_kernels.contract import BlockDims

if TYPE_CHECKING:
    from mpoe_kernels.embedding.op import EmbeddingBackwardCall, EmbeddingCall


@lru_cache(maxsize=1024)
def _is_rebuilt(dims: BlockDims, rows: int, device_type: str = "cpu") -> bool:
    """Whether rebuilding the table takes fewer FLOPs, or less memory: the table is held twice; by
    blocks, every row copies a slice of right. On a GPU always: the other way would wait for it."""
    d = dims
    copied_elements = rows * d.b * d.jR
    if device_type != "cpu" or copied_elements > 2 * d.weight_elements:
        return True
    flops = 2 * rows * d.jL * d.jC * d.b * (d.a + d.jR)
    return flops > d.rebuild_flops


def _by_central_digit(ids: Tensor, dims: BlockDims) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For every iC that occurs: iC, the places of its tokens, and their iL and iR."""
    digits = ids // dims.iR % dims.iC
    order = torch.argsort(digits, stable=True)
    present, counts = torch.unique_consecutive(digits[order], return_counts=True)
    parts = order.split(counts.tolist())
    for digit, tokens in zip(present.tolist(), parts, strict=True):
        rows = ids[tokens]
        yield digit, tokens, rows // (dims.iC * dims.iR), rows % dims.iR


def forward(call: EmbeddingCall) -> Tensor:
    """Computed in the cheaper way."""
    ids = call.ids
    check_range("ids", ids, 0, call.num_embeddings - 1, IndexError)
    if _is_rebuilt(call.dims, ids.numel(), ids.device.type):
        return _rows_of_table(call)
    return _rows_of_blocks(call)


def backward(call: EmbeddingBackwardCall) -> tuple[Tensor, ...]:
    """Those that are needed of all gradients, computed in the same way as the forward."""
    ids = call.ids
    check_range("ids", ids, 0, call.num_embeddings - 1, IndexError)
    # whole rows [T, jL jC jR], as the blocks have them
    row_size = call.dims.jL * call.dims.jC * call.dims.jR
    grad = pad(call.grad, (0, row_size - call.embedding_dim))
    if _is_rebuilt(call.dims, ids.numel(), ids.device.type):
        gradients = _gradients_by_table(call, grad)
    else:
        gradients = _gradients_by_blocks(call, grad)
    results = []
    blocks = (call.left, call.central, call.right)
    for like, gradient, needed in zip(blocks, gradients, call.need, strict=True):
        if needed:
            results.append(gradient.reshape(like.shape).contiguous())  # as the op's fake promises
        else:
            results.append(like.new_empty(0))
    return tuple(results)


def _rows_of_table(call: EmbeddingCall) -> Tensor:
    d = call.dims
    table = torch.einsum("ija,akmb,bln->ikljmn", call.left[0], call.central, call.right[0])
    table = table.reshape(-1, d.jL * d.jC * d.jR)
    return table[:, : call.embedding_dim].index_select(0, call.ids)


def _gradients_by_table(call: EmbeddingCall, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = call.dims
    left = call.left[0]
    central = call.central
    right = call.right[0]
    dtable = grad.new_zeros(d.iL * d.iC * d.iR, grad.shape[1])
    dtable.index_add_(0, call.ids, grad)
    dtable = dtable.view(d.iL, d.iC, d.iR, d.jL, d.jC, d.jR)
    dhalf = torch.einsum("ikljmn,bln->ijkmb", dtable, right)
    dleft = torch.einsum("ijkmb,akmb->ija", dhalf, central)
    dcentral = torch.einsum("ija,ijkmb->akmb", left, dhalf)
    dright = torch.einsum("ija,akmb,ikljmn->bln", left, central, dtable)
    return dleft, dcentral, dright


def _rows_of_blocks(call: EmbeddingCall) -> Tensor:
    d = call.dims
    left = call.left[0]
    central = call.central
    right_by_digit = call.right[0].transpose(0, 1)  # [iR, b, jR]
    y = left.new_empty(call.ids.numel(), d.jL * d.jC * d.jR)
    for digit, tokens, left_digit, right_digit in _by_central_digit(call.ids, d):
        half = left[left_digit].flatten(0, 1) @ central[:, digit].flatten(1)
        half = half.view(-1, d.jL * d.jC, d.b)
        rows = torch.bmm(half, right_by_digit[right_digit])
        y.index_copy_(0, tokens, rows.flatten(1))
    return y[:, : call.embedding_dim].contiguous()


def _gradients_by_blocks(call: EmbeddingCall, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d = call.dims
    left = call.left[0]
    central = call.central
    right_by_digit = call.right[0].transpose(0, 1)  # [iR, b, jR]
    dleft = torch.zeros_like(left)
    dcentral = torch.zeros_like(central)
    dright_by_digit = torch.zeros_like(right_by_digit)
    for digit, tokens, left_digit, right_digit in _by_central_digit(call.ids, d):
        rows = left[left_digit].flatten(0, 1)  # [tokens jL, a]
        part = central[:, digit].flatten(1)  # [a, jC b]
        half = (rows @ part).view(-1, d.jL * d.jC, d.b)
        grad_rows = grad[tokens].view(-1, d.jL * d.jC, d.jR)
        dright_by_digit.index_add_(0, right_digit, torch.bmm(half.mT, grad_rows))
        dhalf = torch.bmm(grad_rows, right_by_digit[right_digit].mT)
        dhalf = dhalf.view(len(rows), -1)
        dcentral[:, digit] = (rows.T @ dhalf).view(d.a, d.jC, d.b)
        dleft.index_add_(0, left_digit, (dhalf @ part.T).view(-1, d.jL, d.a))
    return dleft, dcentral, dright_by_digit.transpose(0, 1)
