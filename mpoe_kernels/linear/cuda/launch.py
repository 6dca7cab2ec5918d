"""The contractions of csrc/cuda/steps.h, and what surrounds them, as a GPU backend supplies them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.planner import may_round_to_tf32
from mpoe_kernels.planner.orders import BlockDims

AXES = BlockDims._fields[:8]


def _layout(operand: Operand) -> list[int]:
    """Strides of all axes, of slots or experts, and true columns, as csrc/cuda/bind_linear.cpp reads them."""
    strides = operand.strides
    # An axis of size 1 may have any stride, but 0 says that there is none.
    return [*((strides[axis] or 1) if axis in strides else 0 for axis in AXES), operand.outer, operand.limit]


@dataclass(frozen=True)
class CudaLaunches:
    """See `mpoe_kernels.linear.gpu.products.Launches`.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any
    writes_idle_experts = True

    def rows_times_block(
        self,
        rows: Operand,
        operand: Operand,
        dims: BlockDims,
        offsets: Tensor,
        slots: int,
        *,
        out: Operand,
        row_index: Tensor | None = None,
        bias: Tensor | None = None,
        activation: str = "none",
        pre: Tensor | None = None,
        tail: bool = True,
    ) -> Operand:
        self.ops.rows_times_block(
            *(rows.data, _layout(rows), operand.data, _layout(operand), out.data, _layout(out)),
            *(dims[:8], offsets, slots, row_index, bias, activation, pre, may_round_to_tf32(rows.data.dtype), tail),
        )
        return out

    def block_gradient(
        self,
        rows: Operand,
        grads: Operand,
        name: str,
        dims: BlockDims,
        offsets: Tensor,
        *,
        out: Operand,
        row_index: Tensor | None = None,
    ) -> Operand:
        self.ops.block_gradient(
            *(rows.data, _layout(rows), grads.data, _layout(grads), out.data, _layout(out)),
            *(dims[:8], offsets, grads.data.shape[0], row_index, may_round_to_tf32(rows.data.dtype)),
        )
        return out

    def merge_blocks(
        self,
        first: Operand,
        second: Operand,
        out: Operand,
        dims: BlockDims,
        offsets: Tensor,
        *,
        accumulate: bool = False,
    ) -> Operand:
        self.ops.merge_blocks(
            *(first.data, _layout(first), second.data, _layout(second), out.data, _layout(out)),
            *(dims[:8], offsets, may_round_to_tf32(first.data.dtype)),
        )
        return out

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if activation == "none" and not need_bias:
            return grad, None
        dz, dbias = self.ops.activation_backward(grad, saved, offsets, activation, need_bias)
        return grad if activation == "none" else dz, dbias if need_bias else None

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        return self.ops.sum_rows(rows, *slots_by_token(row_index, tokens))
