"""Products of rows with the blocks of their own experts, one expert after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mpoe_kernels.linear.gradients import Slots
from mpoe_kernels.linear.grouped import BlocksProduct, RowsProduct


class ByExpert:
    """See `mpoe_kernels.linear.grouped.Grouped`: for slots that all have an expert."""

    fuses = False

    def rows(self, product: RowsProduct) -> tuple[Tensor, None]:
        rows = product.rows
        blocks = product.blocks
        busy, counts = _busy(product.slots)
        of_experts = blocks.unbind()
        weights = [of_experts[expert] for expert in busy]
        y = grouped_mm(rows.flatten(0, 1), weights, counts)
        slots, p, _ = rows.shape
        return y.view(slots, p, blocks.shape[2]), None

    def blocks(self, product: BlocksProduct) -> Tensor:
        rows = product.rows
        grads = product.grads
        busy, counts = _busy(product.slots)
        experts = product.slots.offsets.shape[0] - 1
        new = rows.new_zeros
        if len(busy) == experts:
            new = rows.new_empty
        d = new(experts, rows.shape[2], grads.shape[2])
        of_experts = d.unbind()
        targets = [of_experts[expert] for expert in busy]
        grouped_outer(rows.flatten(0, 1), grads.flatten(0, 1), counts, targets)
        return d


def _busy(slots: Slots) -> tuple[list[int], list[int]]:
    """The experts that have slots, and how many."""
    assert slots.of_experts is not None, "the offsets have been read"
    busy = [expert for expert, count in enumerate(slots.of_experts) if count]
    return busy, [slots.of_experts[expert] for expert in busy]


def accumulator(like: Tensor) -> Tensor:
    """Zeros like ``like`` to add partial sums to: at least float32, contiguous."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def grouped_mm(
    rows: Tensor, weights: list[Tensor], counts: list[int], out: Tensor | None = None
) -> Tensor:
    """``out_e = rows_e @ weights[e]`` for consecutive groups of rows; exactly one call per group.

    Args:
        rows: ``[slots * p, k]``, p consecutive rows for each slot.
        weights: ``[k, m]`` for each group, any strides.
        counts: slots of each group; all rows belong to one.
        out: ``[slots * p, m]`` to write to.

    Returns:
        ``[slots * p, m]``.
    """
    if out is None:
        out = rows.new_empty(rows.shape[0], weights[0].shape[1])
    if len(counts) == 1:
        return torch.mm(rows, weights[0], out=out)
    sizes = _rows_of(rows, counts)
    parts = torch.split_with_sizes(rows, sizes)
    results = torch.split_with_sizes(out, sizes)
    for part, weight, result in zip(parts, weights, results, strict=True):
        torch.mm(part, weight, out=result)
    return out


def _rows_of(rows: Tensor, counts: list[int]) -> list[int]:
    """Rows of every group."""
    of_slot = rows.shape[0] // sum(counts)
    return [count * of_slot for count in counts]


def grouped_outer(
    rows: Tensor, grads: Tensor, counts: list[int], targets: Iterable[Tensor]
) -> None:
    """``targets[e] = rows_e^T @ grads_e``: gradient of a grouped GEMM's weights.

    Args:
        rows, grads: ``[slots * p, k]`` and ``[slots * p, m]``, p consecutive rows for each slot.
        counts: slots of each group; all rows belong to one.
        targets: one for each group; any shape whose elements, in order, are those of ``[k, m]``,
            any strides.
    """
    sizes = _rows_of(rows, counts)
    # With few columns MKL accumulates the long sum sequentially; transposed, the rounding error is
    # several times smaller.
    narrow = grads.shape[1] < 16 < rows.shape[1]
    parts = torch.split_with_sizes(rows, sizes)
    of_parts = torch.split_with_sizes(grads, sizes)
    for part, grad, target in zip(parts, of_parts, targets, strict=True):
        if narrow:
            transposed = grad.T @ part
            target.copy_(transposed.T.reshape(target.shape))
        elif target.is_contiguous():
            torch.mm(part.T, grad, out=target.view(part.shape[1], -1))
        else:
            target.copy_((part.T @ grad).view(target.shape))
