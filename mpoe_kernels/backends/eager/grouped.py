"""GEMMs over groups of rows that lie behind one another, one weight per group."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def active_groups(offsets: list[int]) -> Iterator[tuple[int, int, int]]:
    """``(expert, first row, last row + 1)`` of every expert that has rows."""
    for expert, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop > start:
            yield expert, start, stop


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
