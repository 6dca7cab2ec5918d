"""Grouped MPO linear by the kernels of csrc/cuda/linear.h."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.cuda.cost import ways
from mpoe_kernels.planner import Contraction, Hardware, may_round_to_tf32
from mpoe_kernels.planner.orders import applications
from mpoe_kernels.registry import Candidate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_INDEX = 2**31 - 1  # rows and columns are counted in 32 bits, addresses in 64


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the kernels cannot compute a contraction."""
    reasons = []
    rows = max((step.m * plan.slots for step in applications(plan.dims, plan.order)), default=0)
    if rows > LARGEST_INDEX:
        reasons.append(f"strategy {plan.strategy!r} would count {rows} rows; it counts to {LARGEST_INDEX}")
    if plan.dims.weight_elements > LARGEST_INDEX:
        reasons.append(f"a weight of {plan.dims.weight_elements} elements is too large; at most {LARGEST_INDEX}")
    return reasons


@dataclass(frozen=True)
class LinearKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
        hardware: numbers of a device, by which a candidate's form and time are predicted.
    """

    ops: Any
    hardware: Callable[[str], Hardware]

    def candidates(self, name: str, plan: Contraction) -> list[Candidate]:
        """The ways of `ways`, each told its program. ``name``: of the backend."""
        run = self.forward if plan.phase == "forward" else self.backward
        found = ways(plan, self.hardware(plan.device))
        return [Candidate(name, w.name, plan.strategy, w.seconds, partial(run, program=w.program)) for w in found]

    def forward(self, call: ForwardCall, program: str) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, h, z)``, see `ForwardCall`. ``program``: the text that csrc/cuda/linear.h understands."""
        x, save_h, save_z = call.x, call.saves_h, call.saves_z
        y, h, z = self.ops.linear_forward(
            *(x, *call.blocks, call.expert_offsets, call.bias, call.row_index),
            *(call.in_features, call.out_features, call.activation),
            *(program, may_round_to_tf32(x.dtype), save_h, save_z),
        )
        return y, h if save_h else x.new_empty(0), z if save_z else x.new_empty(0)

    def backward(self, call: BackwardCall, program: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
        x, row_index = call.x, call.row_index
        dx, dleft, dcentral, dright, dbias = self.ops.linear_backward(
            *(call.grad, x, *call.blocks, call.expert_offsets, row_index, call.saved_h),
            *(None if call.activation == "none" else call.saved, call.in_features, call.out_features, call.activation),
            *(program, may_round_to_tf32(x.dtype), *call.need),
        )
        if call.need[0] and row_index is not None:
            dx = self.ops.sum_rows(dx, *slots_by_token(row_index, x.shape[0]))
        return dx, dleft, dcentral, dright, dbias
