"""Rows of an MPO table, from the kernels of the grouped product.

Row number = (iL, iC, iR). The rows of left are gathered by iL; the slices of the central block and of right act as
"experts", selected by iC and iR: two grouped products, each after a counting sort by that digit. The sum of left's
gradients also uses a counting sort. For many rows, rebuilding the whole table costs less; the gradients of its rows are
summed after PyTorch's sort, because a vocabulary has too many ids for a counting sort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.contract.program import weight_backward_program, weight_program
from mpoe_kernels.embedding.call import EmbeddingBackwardCall, EmbeddingCall
from mpoe_kernels.indices import check_ids, slots_by_token
from mpoe_kernels.linear.gpu.operands import Operand, activations, block
from mpoe_kernels.linear.gpu.primitives import Rows, Sum
from mpoe_kernels.linear.gpu.products import BlockGradients, Pass, blocks_of
from mpoe_kernels.linear.triton.launch import LAUNCHES
from mpoe_kernels.routing.triton import collect_rows, gather_rows, sort_pairs
from mpoe_kernels.triton.pointwise import sum_rows


def gather_is_cheaper(dims: BlockDims, rows: int) -> bool:
    """Whether contracting ``rows`` individual rows takes fewer FLOPs than rebuilding the table."""
    central = dims.jL * dims.a * dims.jC * dims.b
    right = dims.jL * dims.jC * dims.b * dims.jR
    return rows * 2 * (central + right) <= dims.rebuild_flops


@dataclass(frozen=True)
class _Sorted:
    """Tokens sorted by one digit."""

    offsets: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor

    @classmethod
    def by(cls, digit: Tensor, count: int) -> _Sorted:
        return cls(*sort_pairs(digit.unsqueeze(1), count))


@dataclass(frozen=True)
class _Gathered:
    """The gather path: operands and both orders of the tokens."""

    dims: BlockDims
    left_digit: Tensor
    by_centre: _Sorted
    by_right: _Sorted
    left_rows: Operand  # [iL, (jL a)]
    central: Operand  # its experts are the iC slices
    right: Operand  # its experts are the iR slices

    @classmethod
    def of(cls, ids: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> _Gathered:
        plain = left[0].contiguous().view(dims.iL, -1)
        return cls(
            dims,
            ids // (dims.iC * dims.iR),
            _Sorted.by(ids // dims.iR % dims.iC, dims.iC),
            _Sorted.by(ids % dims.iR, dims.iR),
            activations(plain, ("jL", "a"), dims),
            _slices(block(central, "C"), "iC"),
            _slices(block(right, "R"), "iR"),
        )

    def half(self) -> Operand:
        """``[T, (jL jC b)]`` in the order of the centre's digit."""
        slots = self.left_digit.shape[0]
        rows = self.left_digit[self.by_centre.token_of_slot]
        out = activations(
            self.left_rows.data.new_empty(slots, self.dims.jL * self.dims.jC * self.dims.b),
            ("jL", "jC", "b"),
            self.dims,
        )
        LAUNCHES.rows(Rows(self.left_rows, self.central, out, self.dims, self.by_centre.offsets, rows))
        return out

    def half_row_of_slot(self) -> Tensor:
        """The row of `half` that each slot, in the order of the right digit, reads."""
        return self.by_centre.slot_of_token[self.by_right.token_of_slot, 0]


def _slices(operand: Operand, axis: str) -> Operand:
    """A block whose slices along one axis act as the experts."""
    strides = {name: stride for name, stride in operand.strides.items() if name != axis}
    return Operand(operand.data, strides, operand.strides[axis])


def forward(call: EmbeddingCall) -> Tensor:
    """Few rows are gathered; many are read from the rebuilt table."""
    ids, (left, central, right), dims = call.ids, call.blocks, call.dims
    check_ids(ids, call.num_embeddings)
    if not gather_is_cheaper(dims, ids.shape[0]):
        table = _table(left, central, right, dims)
        filled = torch.full((1,), ids.shape[0], dtype=torch.int32, device=ids.device)
        return gather_rows(table, filled, ids)[:, : call.embedding_dim].contiguous()
    gathered = _Gathered.of(ids, left, central, right, dims)
    y = left.new_empty(ids.shape[0], call.embedding_dim)
    out = activations(y, ("jL", "jC", "jR"), dims, call.embedding_dim)
    where = gathered.by_right.offsets, gathered.half_row_of_slot()
    LAUNCHES.rows(Rows(gathered.half(), gathered.right, out, dims, *where))
    return collect_rows(y, gathered.by_right.slot_of_token)


def _one_expert(like: Tensor) -> Tensor:
    """Offsets that give all slots to the only expert."""
    return torch.arange(2, dtype=torch.int32, device=like.device)


def _table(left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> Tensor:
    """``[iL iC iR, jL jC jR]``, padding included."""
    table = left.new_empty(1, dims.weight_elements)
    program = weight_program(dims)
    LAUNCHES.compute(Pass(program, dims, _one_expert(left), 0, {"W": table, **blocks_of(left, central, right)}))
    return table.view(dims.iL * dims.iC * dims.iR, -1)


def backward(call: EmbeddingBackwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """Computed in the same way as the forward."""
    ids, (left, central, right), dims = call.ids, call.blocks, call.dims
    grad = call.grad.contiguous()
    if not gather_is_cheaper(dims, ids.shape[0]):
        return _table_backward(grad, ids, left, central, right, dims)
    dcentral = torch.zeros(central.shape, dtype=central.dtype, device=central.device)
    dright = torch.zeros(right.shape, dtype=right.dtype, device=right.device)
    gathered = _Gathered.of(ids, left, central, right, dims)
    by_centre, by_right, slots = gathered.by_centre, gathered.by_right, ids.shape[0]
    rows = gather_rows(grad, by_right.offsets, by_right.token_of_slot)
    drows = activations(rows, ("jL", "jC", "jR"), dims, call.embedding_dim)
    out = _slices(block(dright, "R"), "iR")
    LAUNCHES.gradient(Sum(gathered.half(), drows, out, dims, by_right.offsets, gathered.half_row_of_slot()))
    width = dims.jL * dims.jC * dims.b
    half_axes = ("jL", "jC", "b")
    dhalf = activations(grad.new_empty(slots, width), half_axes, dims)
    LAUNCHES.rows(Rows(drows, gathered.right, dhalf, dims, by_right.offsets))
    # From the order of the right digit to the order of the centre's digit.
    turned = by_right.slot_of_token[by_centre.token_of_slot, 0]
    dhalf = activations(gather_rows(dhalf.data, by_centre.offsets, turned), half_axes, dims)
    out = _slices(block(dcentral, "C"), "iC")
    left_row = gathered.left_digit[by_centre.token_of_slot]
    LAUNCHES.gradient(Sum(gathered.left_rows, dhalf, out, dims, by_centre.offsets, left_row))
    dleft_rows = activations(grad.new_empty(slots, dims.jL * dims.a), ("jL", "a"), dims)
    LAUNCHES.rows(Rows(dhalf, gathered.central, dleft_rows, dims, by_centre.offsets))
    by_left = _Sorted.by(left_row, dims.iL)
    dleft = sum_rows(dleft_rows.data, by_left.token_of_slot, by_left.offsets)
    return dleft.view(left.shape), dcentral, dright


def _table_backward(
    grad: Tensor, ids: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the rows' gradients into a table's, and project that onto the blocks."""
    padded = grad.new_zeros(dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR)
    padded[: dims.in_features, : dims.out_features] = sum_rows(grad, *slots_by_token(ids, dims.in_features))
    program = weight_backward_program(dims)
    grads = BlockGradients.begun(LAUNCHES, program, (left, central, right))
    values = {"d W": padded.view(1, -1), **blocks_of(left, central, right), **grads.values()}
    LAUNCHES.compute(Pass(program, dims, _one_expert(left), 0, values))
    return cast(tuple[Tensor, Tensor, Tensor], grads.results(central.dtype))  # all were requested
