"""Grouped MPO linear by the compiled kernels of csrc/cpu/linear.h; same arguments and results as the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.planner import Contraction

OPS = torch.ops.mpoe_native
DTYPES = (torch.float32, torch.bfloat16)
# Strategies with a kernel, by phase: the table kStrategies of csrc/linear_ops.cpp.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "forward": ("separable", "rebuild", "half_left", "half_right", "chain"),
    "backward": ("separable", "rebuild", "half_left", "half_right", "chain"),
}


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the native kernels cannot compute a contraction."""
    reasons = []
    if plan.dtype not in DTYPES:
        reasons.append(f"it runs on float32 and bfloat16, not on {str(plan.dtype).removeprefix('torch.')}")
    if plan.strategy not in IMPLEMENTED[plan.phase]:
        reasons.append(f"it has no {plan.phase} kernel for the strategy {plan.strategy!r}")
    return reasons


def linear_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    row_index: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y [N, F], h, z)``; ``h`` and ``z`` are empty unless backward will need them."""
    save_h, save_z = save and strategy == "separable", save and activation not in ("none", "relu")
    y, h, z = OPS.linear_forward(
        *(x, left, central, right, expert_offsets, bias, row_index),
        *(in_features, out_features, activation, strategy, save_h, save_z),
    )
    return y, h if save_h else x.new_empty(0), z if save_z else x.new_empty(0)


def linear_backward(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    row_index: Tensor | None,
    h: Tensor,
    saved: Tensor,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``; ``need`` says which, the others are empty."""
    return OPS.linear_backward(
        *(grad, x, left, central, right, expert_offsets, row_index, h, saved),
        *(in_features, out_features, activation, strategy, *need),
    )


LINEAR_KERNELS: dict[str, Callable[..., Any]] = {
    "grouped_mpo_linear": linear_forward,
    "grouped_mpo_linear_backward": linear_backward,
}
