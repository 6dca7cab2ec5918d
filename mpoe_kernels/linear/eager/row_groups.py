"""GEMMs over groups of consecutive rows, one weight per group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# (expert, first row, last row + 1)
Group = tuple[int, int, int]


def active_groups(offsets: list[int]) -> Iterator[Group]:
    """``(expert, first row, last row + 1)`` of every expert that has rows."""
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop > start:
            yield expert, start, stop


def are_consecutive(experts: list[int]) -> bool:
    """Whether ascending experts have no gap."""
    return experts[-1] - experts[0] + 1 == len(experts)


def select_experts(stacked: Tensor, experts: list[int]) -> Tensor:
    """Some experts of ``[E, ...]``, in ascending order: a view if they are consecutive."""
    if are_consecutive(experts):
        return stacked[experts[0] : experts[-1] + 1]
    return stacked[experts]


def clear_idle(stacked: Tensor, offsets: list[int]) -> Tensor:
    """Zero ``stacked[e]`` for every expert without rows, in place; returns ``stacked``."""
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop == start:
            stacked[expert] = 0
    return stacked


def store(stacked: Tensor, experts: list[int], values: Tensor) -> None:
    """``stacked[experts] = values``, without an index if the experts are consecutive."""
    if are_consecutive(experts):
        stacked[experts[0] : experts[-1] + 1] = values
    else:
        stacked[experts] = values


def accumulator(like: Tensor) -> Tensor:
    """Zeros like ``like`` to add partial sums to: at least float32, contiguous."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def accumulate_mm(total: Tensor, first: Tensor, second: Tensor, scratch: Tensor | None = None) -> None:
    """``total += first @ second`` for an `accumulator`.

    In low precision the product is computed in ``scratch`` (any shape), as many columns at a time as fit.
    """
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    elif scratch is None or scratch.numel() < total.shape[0]:
        total += first @ second
    else:
        step = scratch.numel() // total.shape[0]
        for start in range(0, total.shape[1], step):
            columns = second[:, start : start + step]
            room = scratch[: total.shape[0] * columns.shape[1]].view(total.shape[0], -1)
            total[:, start : start + step] += torch.mm(first, columns, out=room)


def grouped_mm(rows: Tensor, weights: list[Tensor], counts: list[int], out: Tensor | None = None) -> Tensor:
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
    each = rows.shape[0] // sum(counts)
    sizes = [count * each for count in counts]
    parts, results = torch.split_with_sizes(rows, sizes), torch.split_with_sizes(out, sizes)
    for part, weight, result in zip(parts, weights, results, strict=True):
        torch.mm(part, weight, out=result)
    return out


def grouped_outer(rows: Tensor, grads: Tensor, counts: list[int], targets: Iterable[Tensor]) -> None:
    """``targets[e] = rows_e^T @ grads_e``: gradient of a grouped GEMM's weights.

    Args:
        rows, grads: ``[slots * p, k]`` and ``[slots * p, m]``, p consecutive rows for each slot.
        counts: slots of each group; all rows belong to one.
        targets: one for each group; any shape whose elements, in order, are those of ``[k, m]``, any strides.
    """
    each = rows.shape[0] // sum(counts)
    sizes = [count * each for count in counts]
    # With few columns MKL accumulates the long sum sequentially; transposed, the rounding error is several times
    # smaller.
    narrow = grads.shape[1] < 16 < rows.shape[1]
    parts, of_parts = torch.split_with_sizes(rows, sizes), torch.split_with_sizes(grads, sizes)
    for part, grad, target in zip(parts, of_parts, targets, strict=True):
        if narrow:
            target.copy_((grad.T @ part).T.reshape(target.shape))
        elif target.is_contiguous():
            torch.mm(part.T, grad, out=target.view(part.shape[1], -1))
        else:
            target.copy_((part.T @ grad).view(target.shape))
