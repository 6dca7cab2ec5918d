"""Grouped MPO linear by the kernels of csrc/cuda/linear.

`rebuild` is the fused contraction, whose weights never leave the chip. Forward: one launch. Backward: one of the same
kernel for x, one of the gradient kernel for left and central, one for right, with a library product each. Other
strategies go product by product: one launch for what every expert has for itself, the library for what is shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear import grouped
from mpoe_kernels.linear.gradients import Backward, Forward, Slots, fused_backward, fused_forward, prepared
from mpoe_kernels.linear.grouped import ON_CHIP, BlocksProduct, RowsProduct

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

Call = TypeVar("Call", "ForwardCall", "BackwardCall")
BLOCKS_WANTED = 256  # of a launch whose sum can be divided, whatever the card
SIDE = 64  # rows and columns of a block of threads


def _prepared(call: Call) -> Call:
    """The kernels read dense tensors and count slots in 32 bits."""
    if call.expert_offsets.dtype != torch.int32:
        call = replace(call, expert_offsets=call.expert_offsets.to(torch.int32))
    return prepared(call, "x", "left", "central", "right")


def _lines(rows: Tensor, turned: bool) -> Tensor:
    """Rows ``[N, p, k]``, or turned ``[N, k, p]``, whose last axis is dense: a view if they lie so."""
    lines = rows.transpose(1, 2) if turned else rows
    return lines if lines.stride(2) == 1 or lines.shape[2] == 1 else lines.contiguous()


def _is_turned(rows: Tensor | None) -> bool:
    """Whether rows ``[N, p, k]`` have adjacent elements of p, and could not be read the other way."""
    return rows is not None and rows.stride(1) == 1 and min(rows.shape[1:]) > 1


def _by_bond(right: Tensor) -> Tensor:
    """``[E, b, iR, jR] -> [E, iR, jR, b]``: the kernels read runs of bonds."""
    return right.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class LinearKernels:
    """The kernels of the op; also as `mpoe_kernels.linear.grouped.Grouped`.

    Attributes:
        ops: namespace of the compiled ops.
        name: of the backend.
    """

    ops: Any
    name: str = "cuda"

    shares = True
    contraction_reasons = staticmethod(grouped.counting_reasons)

    def candidates(self, plan: Contraction) -> list[Candidate]:
        """One for every strategy."""
        name = ON_CHIP if plan.strategy == "rebuild" else plan.strategy
        return [Candidate(self.name, name, plan.strategy, getattr(self, plan.phase))]

    def forward(self, call: ForwardCall) -> Forward:
        """``(y, h, z)``, see `ForwardCall`."""
        call = _prepared(call)
        return fused_forward(call, self._product) if call.strategy == "rebuild" else grouped.forward(call, self)

    def backward(self, call: BackwardCall) -> Backward:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
        call = _prepared(call)
        if call.strategy != "rebuild":
            return grouped.backward(call, self)
        return fused_backward(call, self._product, self._weight_gradient_times)

    def rows(self, given: RowsProduct) -> tuple[Tensor, Tensor | None]:
        """See `Grouped`. One launch."""
        rows, row_index, blocks, slots, last, out, turned = given
        (_, p, _), n, turned = rows.shape, blocks.shape[2], turned and out is None
        out = rows.new_empty(slots.count, *((n, p) if turned else (p, n))) if out is None else out
        pre = torch.empty_like(out) if last is not None and last.saves_z else None
        _, bias, activation, *placed = (None, None, "none", None, None) if last is None else last.around
        where = slots.offsets, row_index, turned, not slots.is_part
        self.ops.grouped_rows(_lines(rows, turned), blocks.contiguous(), out, *where, bias, activation, pre, *placed)
        if not turned:
            return out, pre
        return out.transpose(1, 2), None if pre is None else pre.transpose(1, 2)

    def blocks(self, given: BlocksProduct) -> Tensor:
        """See `Grouped`. One launch, and a sum if there are parts."""
        rows, row_index, grads, slots, blocks, drows, again, activation = given
        experts, (_, p, m), n = slots.offsets.shape[0] - 1, rows.shape, grads.shape[2]
        tiles = experts * -(-m // SIDE) * -(-n // SIDE)  # with few, an expert's rows are divided
        most = BLOCKS_WANTED // tiles // (2 if blocks is None else 1)  # of more parts, the sum takes what they save
        parts = max(1, min(most, slots.count * p // (SIDE * experts)))
        out = rows.new_empty(parts, experts, m, n, dtype=torch.float32)
        turned = _is_turned(rows) if blocks is None else _is_turned(drows) or _is_turned(again)
        lines = _lines(rows, turned), _lines(grads, turned), None if blocks is None else blocks.contiguous()
        where = slots.offsets, row_index, turned
        self.ops.grouped_blocks(*lines, out, drows, again, *where, activation)
        return (out.sum(0) if parts > 1 else out[0]).to(rows.dtype)

    def _product(
        self, call: ForwardCall | BackwardCall, rows: Tensor, out: Tensor, pre: Tensor | None, transposed: bool
    ) -> None:
        """See `mpoe_kernels.linear.gradients.Product`."""
        blocks, (row_index, bias, activation, *placed) = (call.left, call.central, _by_bond(call.right)), call.around
        given = rows, *blocks, out, call.expert_offsets, row_index, bias, activation, pre
        self.ops.rebuilt_product(*given, transposed, *placed)

    def _weight_gradient_times(
        self, call: BackwardCall, dz: Tensor, other: Tensor, of_right: bool, slots: Slots
    ) -> Tensor:
        """See `mpoe_kernels.linear.gradients.block_gradients`. One launch."""
        d, experts = call.dims, other.shape[0]
        if of_right:
            parts = max(1, min(d.iC * d.jC, BLOCKS_WANTED // experts))
            other = other.contiguous()
            out = torch.empty(parts, experts, d.iR, d.jR, d.b, dtype=torch.float32, device=dz.device)
        else:
            other = _by_bond(other)
            out = dz.new_empty(experts, d.iL, d.jL, d.iC, d.jC, d.b)
        self.ops.weight_gradient_product(call.x, dz, other, out, slots.offsets.contiguous(), call.row_index, of_right)
        return out.sum(0).permute(0, 3, 1, 2) if of_right else out
