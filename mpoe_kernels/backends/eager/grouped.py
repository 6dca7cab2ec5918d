"""GEMMs over groups of rows that lie behind one another, one weight per group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# (expert, first row, last row + 1)
Group = tuple[int, int, int]


def active_groups(offsets: list[int]) -> Iterator[Group]:
    """``(expert, first row, last row + 1)`` of every expert that has rows."""
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop > start:
            yield expert, start, stop


def select_experts(stacked: Tensor, experts: list[int]) -> Tensor:
    """Some experts of ``[E, ...]``, in ascending order: a view where they are neighbours."""
    if experts[-1] - experts[0] + 1 == len(experts):
        return stacked[experts[0] : experts[-1] + 1]
    return stacked[experts]


def clear_idle(stacked: Tensor, offsets: list[int]) -> Tensor:
    """Zero ``stacked[e]`` for every expert without rows, in place; returns ``stacked``."""
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop == start:
            stacked[expert] = 0
    return stacked


def accumulator(like: Tensor) -> Tensor:
    """Zeros like ``like`` to add partial sums to: at least float32, contiguous."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def accumulate_mm(total: Tensor, first: Tensor, second: Tensor, scratch: Tensor) -> None:
    """``total += first @ second`` for a `accumulator`; in low precision by ranges of columns that fit ``scratch``."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
        return
    step = max(1, scratch.numel() // total.shape[0])
    for start in range(0, total.shape[1], step):
        columns = second[:, start : start + step]
        size = total.shape[0] * columns.shape[1]
        room = scratch[:size] if size <= scratch.numel() else scratch.new_empty(size)
        part = torch.mm(first, columns, out=room.view(total.shape[0], -1))
        total[:, start : start + step] += part


def grouped_mm(rows: Tensor, weights: Tensor, offsets: list[int], per_slot: int) -> Tensor:
    """``out[r] = rows[r] @ weights[e]`` for the ``per_slot`` consecutive rows of every slot of expert e.

    Args:
        rows: ``[N * per_slot, k]``.
        weights: ``[E, k, m]``, any strides.
        offsets: slots of every expert.

    Returns:
        ``[N * per_slot, m]``; rows past the last offset are zero.
    """
    out = rows.new_empty(rows.shape[0], weights.shape[2])
    for expert, start, stop in active_groups(offsets):
        torch.mm(rows[start * per_slot : stop * per_slot], weights[expert], out=out[start * per_slot : stop * per_slot])
    out[offsets[-1] * per_slot :] = 0
    return out


def grouped_outer(rows: Tensor, grads: Tensor, offsets: list[int], per_slot: int) -> Tensor:
    """``out[e] = rows_e^T @ grads_e``: gradient of a grouped GEMM's weights, ``[E, k, m]``; zero for idle experts."""
    out = rows.new_zeros(len(offsets) - 1, rows.shape[1], grads.shape[1])
    for expert, start, stop in active_groups(offsets):
        span = slice(start * per_slot, stop * per_slot)
        torch.mm(rows[span].T, grads[span], out=out[expert])
    return out
