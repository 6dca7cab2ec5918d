"""Checks of what layers are given: token masks, and tensors of a layout that they read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_dense(name: str, value: Tensor) -> None:
    """Refuse sparse, nested and mkldnn tensors."""
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise ValueError(f"{name} must be a dense tensor; got one of the layout {layout}")


def check_mask(name: str, value: object, shape: Sequence[int]) -> Tensor:
    """Require a mask of this shape, bool or of the integers 0 and 1; returns it as bool.

    An additive mask, 0 for what counts, would mean the opposite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a bool tensor {list(shape)}; got {type(value).__name__}")
    check_dense(name, value)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        raise TypeError(
            f"{name} must be bool (or integers), True for tokens and False for padding, not additive; got {value.dtype}"
        )
    if value.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {list(shape)}; got {list(value.shape)}")
    return value.bool()
