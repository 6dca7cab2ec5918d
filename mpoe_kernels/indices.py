"""Checks of indices that several backends share."""

from __future__ import annotations

import torch
from torch import Tensor


def check_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Refuse an entry outside ``low..high``, only on the CPU: elsewhere the check would wait for the device."""
    if index.numel() == 0 or index.device.type != "cpu":
        return
    smallest, largest = (int(v) for v in index.aminmax())
    if smallest < low or largest > high:
        raise ValueError(f"{name} must lie in {low}..{high}; got {smallest if smallest < low else largest}")


def check_offsets(offsets: list[int], slots: int) -> None:
    """Refuse offsets that do not start at 0, decrease, or exceed the slots."""
    if offsets[0] != 0 or offsets[-1] > slots or offsets != sorted(offsets):
        raise ValueError(f"expert_offsets must start at 0, not fall, and end at {slots} at most; got {offsets}")


def check_ids(ids: Tensor, num_embeddings: int) -> None:
    """An id outside the table: an error on the CPU, a device-side assertion elsewhere (nothing waits for it)."""
    if ids.numel() == 0 or ids.device.type == "meta":
        return
    if ids.device.type != "cpu":
        torch._assert_async(((ids >= 0) & (ids < num_embeddings)).all(), "ids lie outside the table")
        return
    low, high = (int(v) for v in ids.aminmax())
    if low < 0 or high >= num_embeddings:
        raise IndexError(f"ids must lie in 0..{num_embeddings - 1}; got {low if low < 0 else high}")
