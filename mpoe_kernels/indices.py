"""Slots sorted by token."""

from __future__ import annotations

import torch
from torch import Tensor


def slots_by_token(row_index: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Which slots read each token.

    Args:
        row_index: int64 ``[N]``, token of every slot.
        tokens: T.

    Returns:
        ``(order [N], starts [T + 1])``: token t was read by the slots ``order[starts[t] : starts[t + 1]]``, ascending.
    """
    ordered, order = torch.sort(row_index, stable=True)
    bounds = torch.arange(tokens + 1, device=row_index.device, dtype=ordered.dtype)
    return order, torch.searchsorted(ordered, bounds)
