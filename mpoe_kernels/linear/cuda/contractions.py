"""The contractions of csrc/cuda/linear/steps.h, one launch each, and the operations around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.contract import may_round_to_tf32
from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.primitives import Pair, Rows, Sum
from mpoe_kernels.linear.gpu.products import Pass, walk

AXES = BlockDims._fields[:8]


def _layout(*operands: Operand) -> list[int]:
    """As ``operand_of_call`` of csrc/cuda/linear/bind.cpp reads it."""
    found = []
    for operand in operands:
        # An axis of size 1 may have any stride, but a stride of 0 means that there is no axis.
        strides = [(operand.strides[axis] or 1) if axis in operand.strides else 0 for axis in AXES]
        found += [operand.outer, operand.limit, *strides]
    return found


def _tensors(product: Pair) -> tuple[Any, ...]:
    """The operands, their layout, the sizes of the axes, and the experts' slots."""
    operands = product.first, product.second, product.out
    return *(each.data for each in operands), _layout(*operands), product.dims[:8], product.offsets


@dataclass(frozen=True)
class CudaLaunches:
    """See `mpoe_kernels.linear.gpu.primitives`: both the primitives and the operations around them.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def rows(self, product: Rows) -> None:
        self.ops.rows_times_block(
            *(*_tensors(product), product.row_index, product.tail, may_round_to_tf32(product.out.data.dtype)),
            *(product.bias, product.activation, product.pre, product.out_index, product.gates),
        )

    def gradient(self, product: Sum) -> None:
        tf32 = may_round_to_tf32(product.first.data.dtype)
        self.ops.block_gradient(*_tensors(product), product.row_index, tf32)

    def merge(self, product: Sum) -> None:
        self.ops.merge_blocks(*_tensors(product), may_round_to_tf32(product.first.data.dtype))

    def compute(self, whole: Pass) -> None:
        """Product after product."""
        walk(whole, self)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory from PyTorch."""
        return like.new_empty(rows, columns)

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        if activation == "none" and not need_bias:
            return grad, None
        dz, dbias = self.ops.activation_backward(grad, saved, offsets, activation, need_bias)
        return grad if activation == "none" else dz, dbias if need_bias else None

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        return self.ops.sum_rows(rows, *slots_by_token(row_index, tokens))

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        return self.ops.combine(rows, slot_of_token, None)

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """All products add in float32."""
        return torch.zeros(block.shape, dtype=torch.float32, device=block.device)

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)
