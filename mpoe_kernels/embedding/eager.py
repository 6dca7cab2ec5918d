"""Rows of an MPO table.

Row number = (iL, iC, iR). Few rows are gathered through the cores, one by one. For more, the central block meets right
for all of them together, and the rows of left that iL names meet the slice of (iC, iR), pair by pair. For very many the
table is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.embedding.call import EmbeddingBackwardCall, EmbeddingCall
from mpoe_kernels.indices import check_ids
from mpoe_kernels.linear.eager.weight import block_order, project_gradient, rebuild_weight
from mpoe_kernels.planner import BlockDims

# GEMMs of a pair are short, and their results must be sorted back.
_PRICE_OF_PAIRS = 2


def _way(dims: BlockDims, rows: int) -> str:
    """``gather``, ``pairs`` or ``rebuild``, the one with the fewest FLOPs."""
    d = dims
    flops = {
        "gather": 2 * rows * d.jL * d.jC * d.b * (d.a + d.jR),
        "pairs": _PRICE_OF_PAIRS * 2 * d.a * d.jC * d.jR * (d.iC * d.b * d.iR + rows * d.jL),
        "rebuild": d.rebuild_flops,
    }
    return min(flops, key=lambda name: flops[name])


class _Pairs(NamedTuple):
    """Tokens sorted by their pair (iC, iR).

    Attributes:
        tokens: the token of every place.
        left_digit: iL, of the places.
        spans: of the places of every pair that some token has: number of the pair, first place, the one after the last.
        slices: ``[iC iR, a, jC jR]``, central and right of a pair.
    """

    tokens: Tensor
    left_digit: Tensor
    spans: list[tuple[int, int, int]]
    slices: Tensor

    @classmethod
    def of(cls, ids: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> _Pairs:
        d, pair = dims, ids % (dims.iC * dims.iR)
        tokens = torch.argsort(pair, stable=True)
        numbers, counts = torch.unique_consecutive(pair[tokens], return_counts=True)
        ends = counts.cumsum(0)
        spans = list(zip(numbers.tolist(), (ends - counts).tolist(), ends.tolist(), strict=True))
        slices = (central.reshape(-1, d.b) @ right.reshape(d.b, -1)).view(d.a, d.iC, d.jC, d.iR, d.jR)
        slices = slices.permute(1, 3, 0, 2, 4).reshape(d.iC * d.iR, d.a, d.jC * d.jR)
        return cls(tokens, ids[tokens] // (d.iC * d.iR), spans, slices)

    def groups(self, *places: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
        """Pair by pair, the rows that tensors ``[T, jL, .]`` in the order of the places have for it, as matrices."""
        for pair, first, last in self.spans:
            yield pair, tuple(tensor[first:last].flatten(0, 1) for tensor in places)


def _pairs_forward(ids: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> Tensor:
    """``[T, jL jC jR]``."""
    pairs = _Pairs.of(ids, central, right, dims)
    rows = left[pairs.left_digit]
    out = rows.new_empty(ids.numel(), dims.jL, dims.jC * dims.jR)
    for pair, (x, y) in pairs.groups(rows, out):
        torch.mm(x, pairs.slices[pair], out=y)
    return torch.empty_like(out).index_copy_(0, pairs.tokens, out).flatten(1)


def _pairs_backward(
    grad: Tensor, ids: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of left, central and right from that of `_pairs_forward`'s rows."""
    d, pairs = dims, _Pairs.of(ids, central, right, dims)
    rows, grad = left[pairs.left_digit], grad.view(-1, d.jL, d.jC * d.jR)[pairs.tokens]
    drows, dslices = torch.empty_like(rows), torch.zeros_like(pairs.slices)
    for pair, (x, dx, dy) in pairs.groups(rows, drows, grad):
        torch.mm(dy, pairs.slices[pair].T, out=dx)
        torch.mm(x.T, dy, out=dslices[pair])
    dleft = torch.zeros_like(left).index_add_(0, pairs.left_digit, drows)
    # [(a iC jC), (iR jR)], as the product of the two blocks was.
    dboth = dslices.view(d.iC, d.iR, d.a, d.jC, d.jR).permute(2, 0, 3, 1, 4).reshape(-1, d.iR * d.jR)
    dcentral, dright = dboth @ right.reshape(d.b, -1).T, central.reshape(-1, d.b).T @ dboth
    return dleft, dcentral.view(central.shape), dright.view(right.shape)


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


def forward(call: EmbeddingCall) -> Tensor:
    """By the way that takes the fewest FLOPs."""
    ids, (left, central, right), dims = call.ids, call.blocks, call.dims
    if ids.device.type == "cpu":  # elsewhere the check would wait for the device
        check_ids(ids, call.num_embeddings)
    way = _way(dims, ids.numel())
    if way == "rebuild":
        return rebuild_weight(left[0], central, right[0], dims).index_select(0, ids)
    if way == "pairs":
        return _pairs_forward(ids, left[0], central, right[0], dims)[:, : call.embedding_dim].contiguous()
    left_digit, centre_digit, right_digit = _digits(ids, dims)
    half = _central_step(left[0, left_digit], central, centre_digit)
    rows = torch.bmm(half, right[0].transpose(0, 1)[right_digit])
    return rows.view(ids.numel(), dims.jL * dims.jC * dims.jR)[:, : call.embedding_dim].contiguous()


def backward(call: EmbeddingBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """By the forward's way."""
    grad, ids, (left, central, right), dims = call.grad, call.ids, call.blocks, call.dims
    way = _way(dims, ids.numel())
    if way == "rebuild":
        dtable = grad.new_zeros(call.num_embeddings, call.embedding_dim).index_add_(0, ids, grad)
        ordered = block_order(dtable, dims)
        dleft, dcentral, dright = project_gradient(ordered, left[0], central, right[0], dims, need_central=True)
        assert dcentral is not None
        return dleft.unsqueeze(0), dcentral, dright.unsqueeze(0)
    padded = torch.nn.functional.pad(grad, (0, dims.jL * dims.jC * dims.jR - call.embedding_dim))
    if way == "pairs":
        dleft, dcentral, dright = _pairs_backward(padded, ids, left[0], central, right[0], dims)
        return dleft.unsqueeze(0), dcentral, dright.unsqueeze(0)
    left_digit, centre_digit, right_digit = _digits(ids, dims)
    rows_left = left[0, left_digit]  # [T, jL, a]
    half = _central_step(rows_left, central, centre_digit)  # [T, jL jC, b]
    rows_right = right[0].transpose(0, 1)[right_digit]  # [T, b, jR]
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
