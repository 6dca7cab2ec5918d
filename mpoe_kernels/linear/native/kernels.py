"""Grouped MPO linear by the compiled kernels of csrc/cpu/linear.h."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.linear.call import BackwardCall, ForwardCall
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


def linear_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`."""
    y, h, z = OPS.linear_forward(
        *(call.x, *call.blocks, call.expert_offsets, call.bias, call.row_index),
        *(call.in_features, call.out_features, call.activation, call.strategy, call.saves_h, call.saves_z),
    )
    return y, h if call.saves_h else call.x.new_empty(0), z if call.saves_z else call.x.new_empty(0)


def linear_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return OPS.linear_backward(
        *(call.grad, call.x, *call.blocks, call.expert_offsets, call.row_index, call.h, call.saved),
        *(call.in_features, call.out_features, call.activation, call.strategy, *call.need),
    )
