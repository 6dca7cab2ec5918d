"""Rows of an MPO table.

Row number = (iL, iC, iR). For few rows, the row of left selected by iL is multiplied by the slice
of the central block selected by iC, then by the slice of right selected by iR. For more rows,
central and right are multiplied once for all, and the rows of left are multiplied by the slices of
that product, pair (iC, iR) by pair. For very many rows the table is rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range
from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.eager.rebuild import Matrices, Weights
from mpoe_kernels.linear.eager.rows import grouped_mm, grouped_outer

if TYPE_CHECKING:
    from mpoe_kernels.embedding.op import EmbeddingBackwardCall, EmbeddingCall

# Rows of left gathered at a time: their memory is reused soon, so the system need not clear new
# pages.
_ELEMENTS = 2**19


@lru_cache(maxsize=1024)
def _way(dims: BlockDims, rows: int, device_type: str = "cpu") -> str:
    """``gather``, ``pairs`` or ``rebuild``: the fewest FLOPs, without copying more than rebuilding,
    which holds the table twice. On a GPU ``rebuild``, which alone does not wait for it."""
    d = dims
    if device_type != "cpu":
        return "rebuild"
    of_slices = d.iC * d.b * d.iR
    of_rows = rows * d.jL
    flops = {
        "rebuild": d.rebuild_flops,
        "pairs": 2 * d.a * d.jC * d.jR * (of_slices + of_rows),
    }
    copied = rows * d.b * d.jR  # a slice of right for every row
    if copied <= 2 * d.weight_elements:
        flops["gather"] = 2 * of_rows * d.jC * d.b * (d.a + d.jR)
    return min(flops, key=lambda name: flops[name])


class _Part(NamedTuple):
    """Tokens grouped by the slices that they use.

    Attributes:
        tokens: ``[n]``, those of one group consecutive.
        groups: index of every group's slice.
        counts: number of tokens in every group.
        left_digit, right_digit: iL and iR of the tokens.
    """

    tokens: Tensor
    groups: list[int]
    counts: list[int]
    left_digit: Tensor
    right_digit: Tensor


def _parts(ids: Tensor, dims: BlockDims, pairs: bool) -> Iterator[_Part]:
    """The tokens grouped by their digit iC, or by (iC, iR); in parts of whole groups, so that their
    rows stay small."""
    d = dims
    right_rows = d.iC * d.iR
    if pairs:
        group = ids % right_rows
        columns = d.jC * d.jR
    else:
        group = ids // d.iR % d.iC
        columns = d.jC * d.b
    order = torch.argsort(group, stable=True)
    groups, sizes = torch.unique_consecutive(group[order], return_counts=True)
    numbers = groups.tolist()
    counts = sizes.tolist()
    widest = d.jL * max(d.a, columns)
    most = max(1, _ELEMENTS // widest)
    first = 0
    start = 0
    while first < len(numbers):
        end = start + counts[first]
        last = first + 1
        while last < len(numbers) and end + counts[last] - start <= most:
            end += counts[last]
            last += 1
        tokens = order[start:end]
        rows = ids[tokens]
        yield _Part(
            tokens, numbers[first:last], counts[first:last], rows // right_rows, rows % d.iR
        )
        first = last
        start = end


def _slices(central: Tensor, right: Tensor, dims: BlockDims, pairs: bool) -> Tensor:
    """``[iC, a, jC b]`` of the central block, or ``[iC iR, a, jC jR]`` of its product with
    right."""
    d = dims
    if not pairs:
        return central.transpose(0, 1).reshape(d.iC, d.a, d.jC * d.b)
    both = central.reshape(-1, d.b) @ right.reshape(d.b, -1)
    both = both.view(d.a, d.iC, d.jC, d.iR, d.jR)
    both = both.permute(1, 3, 0, 2, 4)
    return both.reshape(d.iC * d.iR, d.a, d.jC * d.jR)


def forward(call: EmbeddingCall) -> Tensor:
    """Computed in the cheapest way."""
    ids = call.ids
    left = call.left[0]
    central = call.central
    right = call.right[0]
    dims = call.dims
    check_range("ids", ids, 0, call.num_embeddings - 1, IndexError)
    way = _way(dims, ids.numel(), ids.device.type)
    if way == "rebuild":
        table = Weights(left, dims).weight(left, central, right)
        return table.index_select(0, ids)
    pairs = way == "pairs"
    slices = _slices(central, right, dims, pairs)
    right_by_digit = right.transpose(0, 1)  # [iR, b, jR]
    y = left.new_empty(ids.numel(), dims.jL * dims.jC * dims.jR)
    for part in _parts(ids, dims, pairs):
        rows = left[part.left_digit].flatten(0, 1)
        weights = [slices[n] for n in part.groups]
        rows = grouped_mm(rows, weights, part.counts)
        if not pairs:
            half = rows.view(-1, dims.jL * dims.jC, dims.b)
            rows = torch.bmm(half, right_by_digit[part.right_digit])
        y.index_copy_(0, part.tokens, rows.view(part.tokens.numel(), -1))
    return y[:, : call.embedding_dim].contiguous()


def backward(call: EmbeddingBackwardCall) -> tuple[Tensor, ...]:
    """Those that are needed of all gradients."""
    check_range("ids", call.ids, 0, call.num_embeddings - 1, IndexError)
    results = []
    blocks = (call.left, call.central, call.right)
    for like, gradient, needed in zip(blocks, _gradients(call), call.need, strict=True):
        if needed and gradient is not None:
            results.append(gradient.reshape(like.shape).contiguous())  # as the fake says
        else:
            results.append(like.new_empty(0))
    return tuple(results)


def _gradients(call: EmbeddingBackwardCall) -> Matrices:
    """Computed in the same way as the forward, for one expert."""
    grad = call.grad
    ids = call.ids
    left = call.left[0]
    central = call.central
    right = call.right[0]
    dims = call.dims
    way = _way(dims, ids.numel(), ids.device.type)
    if way == "rebuild":
        table = Weights(left, dims)
        table.gradient().zero_().index_add_(0, ids, grad)
        return table.of_blocks(left, central, right, call.need)
    padding = dims.jL * dims.jC * dims.jR - call.embedding_dim
    padded = torch.nn.functional.pad(grad, (0, padding))
    pairs = way == "pairs"
    slices = _slices(central, right, dims, pairs)
    dleft = torch.zeros_like(left)
    dslices = torch.zeros_like(slices)
    right_by_digit = right.transpose(0, 1)  # [iR, b, jR]
    dright_by_digit = torch.zeros_like(right_by_digit, memory_format=torch.contiguous_format)
    for part in _parts(ids, dims, pairs):
        rows = left[part.left_digit].flatten(0, 1)
        weights = [slices[n] for n in part.groups]
        drows = padded[part.tokens]
        if not pairs:
            half = grouped_mm(rows, weights, part.counts)
            half = half.view(-1, dims.jL * dims.jC, dims.b)
            drows = drows.view(-1, dims.jL * dims.jC, dims.jR)
            of_right = torch.bmm(half.transpose(1, 2), drows)
            dright_by_digit.index_add_(0, part.right_digit, of_right)
            chosen = right_by_digit[part.right_digit]
            drows = torch.bmm(drows, chosen.transpose(1, 2))
        drows = drows.view(rows.shape[0], -1)
        grouped_outer(rows, drows, part.counts, [dslices[n] for n in part.groups])
        drows_left = grouped_mm(drows, [weight.T for weight in weights], part.counts)
        dleft.index_add_(0, part.left_digit, drows_left.view(-1, *left.shape[1:]))
    if not pairs:
        dcentral = dslices.view(dims.iC, dims.a, dims.jC, dims.b)
        return dleft, dcentral.transpose(0, 1), dright_by_digit.transpose(0, 1)
    # [(a iC jC), (iR jR)], like the product of the two blocks.
    dboth = dslices.view(dims.iC, dims.iR, dims.a, dims.jC, dims.jR)
    dboth = dboth.permute(2, 0, 3, 1, 4)
    dboth = dboth.reshape(-1, dims.iR * dims.jR)
    dcentral = dboth @ right.reshape(dims.b, -1).T
    dright = central.reshape(-1, dims.b).T @ dboth
    return dleft, dcentral, dright
