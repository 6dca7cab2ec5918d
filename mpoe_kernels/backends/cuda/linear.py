"""Grouped MPO linear by the kernels of csrc/cuda/linear.h; same arguments and results as the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends.cuda.cost import launch_of
from mpoe_kernels.backends.indices import slots_by_token
from mpoe_kernels.planner import ALL_GRADIENTS, BlockDims, Contraction, Hardware, contraction
from mpoe_kernels.planner.contraction import Need
from mpoe_kernels.planner.orders import applications

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


@lru_cache(maxsize=8192)
def _program(
    hardware: Hardware,
    strategy: str,
    dims: BlockDims,
    num_experts: int,
    slots: int,
    dtype: torch.dtype,
    phase: str,
    need: Need,
    saves_h: bool,
) -> str:
    """What the launcher is told to do."""
    plan = contraction(strategy, dims, num_experts, slots, dtype, phase, need)
    return launch_of(plan, hardware, saves_h).program


def may_round_to_tf32(x: Tensor) -> bool:
    """Whether PyTorch may round the factors of a float32 product to tf32."""
    return x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32


@dataclass(frozen=True)
class LinearKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
        hardware: numbers of the device, by which the form of a kernel is chosen.
    """

    ops: Any
    hardware: Callable[[], Hardware]

    def forward(
        self,
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
        dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
        save_h, save_z = save and strategy == "separable", save and activation not in ("none", "relu")
        slots = x.shape[0] if row_index is None else row_index.shape[0]
        sizes = (dims, left.shape[0], slots, x.dtype)
        program = _program(self.hardware(), strategy, *sizes, "forward", ALL_GRADIENTS, save_h)
        y, h, z = self.ops.linear_forward(
            *(x, left, central, right, expert_offsets, bias, row_index, in_features, out_features, activation),
            *(program, may_round_to_tf32(x), save_h, save_z),
        )
        return y, h if save_h else x.new_empty(0), z if save_z else x.new_empty(0)

    def backward(
        self,
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
        dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
        sizes = (dims, left.shape[0], grad.shape[0], x.dtype)
        need_of_plan = (need[0], need[1], need[2], need[3])
        program = _program(self.hardware(), strategy, *sizes, "backward", need_of_plan, False)
        dx, dleft, dcentral, dright, dbias = self.ops.linear_backward(
            *(grad, x, left, central, right, expert_offsets, row_index),
            h if strategy == "separable" and h.numel() else None,
            None if activation == "none" else saved,
            *(in_features, out_features, activation, program, may_round_to_tf32(x), *need),
        )
        if need[0] and row_index is not None:
            dx = self.ops.sum_rows(dx, *slots_by_token(row_index, x.shape[0]))
        return dx, dleft, dcentral, dright, dbias

    def table(self) -> dict[str, Callable[..., Any]]:
        return {"grouped_mpo_linear": self.forward, "grouped_mpo_linear_backward": self.backward}
