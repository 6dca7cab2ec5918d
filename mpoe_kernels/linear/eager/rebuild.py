"""Weights rebuilt from their blocks, one at a time, and gradients of blocks from that of a weight.

Besides inputs and results, memory for two weights is alive, whatever E is. Products of blocks are
in *block order* ``[(iL jL iC jC), (iR jR)]``, weights in ``[(iL iC iR), (jL jC jR)]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.eager.rows import accumulator
from mpoe_kernels.linear.gradients import Gradients

if TYPE_CHECKING:
    from mpoe_kernels.linear.eager import Group, Upstream
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall


DENSE = torch.contiguous_format
Matrices = tuple[Tensor | None, Tensor | None, Tensor | None]  # of left, central, right


class Weights:
    """Memory for a weight in both orders; the half that it is built from, or its gradient's, takes
    the place of one.

    Args:
        like: of the blocks' dtype and device.
        dims: sizes of the blocks.
    """

    def __init__(self, like: Tensor, dims: BlockDims) -> None:
        self.dims = dims
        core = dims.iC * dims.jC
        outer = dims.iL * dims.jL
        inner = dims.iR * dims.jR
        self._size = outer * core * inner
        half = dims.a * core * inner
        if dims.left_first:
            half = outer * core * dims.b
        self._memory = like.new_empty(2, max(self._size, half))

    def _product(self, place: int, first: Tensor, second: Tensor) -> Tensor:
        rows = len(first)
        columns = second.shape[1]
        out = self._memory[place, : rows * columns]
        return torch.mm(first, second, out=out.view(rows, columns))

    def _orders(self) -> tuple[Tensor, Tensor]:
        """One place as a weight, the other as one in block order, both ``[iL, iC, iR, jL, jC,
        jR]``."""
        d = self.dims
        weight, blocks = self._memory[:, : self._size]
        blocks = blocks.view(d.iL, d.jL, d.iC, d.jC, d.iR, d.jR)
        blocks = blocks.permute(0, 2, 4, 1, 3, 5)
        return weight.view(blocks.shape), blocks

    def _true(self, weight: Tensor) -> Tensor:
        matrix = weight.flatten(3).flatten(0, 2)
        return matrix[: self.dims.in_features, : self.dims.out_features]

    def weight(self, left: Tensor, central: Tensor, right: Tensor) -> Tensor:
        """``[I, F]`` of ``left [iL, jL, a]``, ``central [a, iC, jC, b]`` and ``right [b, iR, jR]``;
        for a while."""
        d = self.dims
        left = left.reshape(-1, d.a)
        right = right.reshape(d.b, -1)
        if d.left_first:
            half = self._product(0, left, central.reshape(d.a, -1))
            self._product(1, half.view(-1, d.b), right)
        else:
            half = self._product(0, central.reshape(-1, d.b), right)
            self._product(1, left, half.view(d.a, -1))
        weight, blocks = self._orders()
        return self._true(weight.copy_(blocks))

    def gradient(self) -> Tensor:
        """``[I, F]``, where a weight's gradient is to be written; what pads it is zero."""
        weight = self._orders()[0]
        true = self._true(weight)
        if true.numel() < weight.numel():
            weight.zero_()
        return true

    def of_blocks(
        self, left: Tensor, central: Tensor, right: Tensor, need: Sequence[bool]
    ) -> Matrices:
        """Gradients of the blocks that are needed, from that of the weight, which is lost; as
        matrices, which the caller shapes.

        The gradient of the block outside the half needs the half again, which the weight has
        overwritten since: for a backward that also needs x's gradient this is one merge more than
        the program counts.
        """
        d = self.dims
        need_left, need_central, need_right = need
        weight, blocks = self._orders()
        blocks.copy_(weight)
        left = left.reshape(-1, d.a)
        right = right.reshape(d.b, -1)
        whole = self._memory[1, : self._size].view(len(left), -1)
        dleft = dcentral = dright = None
        if d.left_first:
            whole = whole.view(-1, d.iR * d.jR)
            central = central.reshape(d.a, -1)
            if need_right:
                half = self._product(0, left, central).view(-1, d.b)
                dright = half.T @ whole
            if need_left or need_central:
                dhalf = self._product(0, whole, right.T).view(len(left), -1)
                if need_left:
                    dleft = dhalf @ central.T
                if need_central:
                    dcentral = left.T @ dhalf
        else:
            central = central.reshape(-1, d.b)
            if need_left:
                half = self._product(0, central, right).view(d.a, -1)
                dleft = whole @ half.T
            if need_central or need_right:
                dhalf = self._product(0, left.T, whole).view(len(central), -1)
                if need_central:
                    dcentral = dhalf @ right.T
                if need_right:
                    dright = central.T @ dhalf
        return dleft, dcentral, dright


def _rows(x: Tensor, row_index: Tensor | None, start: int, stop: int) -> Tensor:
    if row_index is None:
        return x[start:stop]
    return x.index_select(0, row_index[start:stop])


def rebuild_forward(call: ForwardCall, groups: list[Group]) -> Tensor:
    """Pre-activation without bias, ``[N, F]``; undefined in slots without an expert."""
    z = call.x.new_empty(call.slots, call.out_features)
    weights = Weights(call.x, call.dims)
    for e, start, stop in groups:
        weight = weights.weight(call.left[e], call.central, call.right[e])
        rows = _rows(call.x, call.row_index, start, stop)
        torch.mm(rows, weight, out=z[start:stop])
    return z


def rebuild_backward(call: BackwardCall, upstream: Upstream, groups: list[Group]) -> Gradients:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed, undefined
    where no expert is.

    The weight is rebuilt rather than saved. The sum over experts is accumulated in at least
    float32.
    """
    need_x, *need = call.need_of_plan
    need_left, need_central, need_right = need
    weights = Weights(call.x, call.dims)
    dx = dleft = dcentral = dright = None
    if need_x:
        dx = call.x.new_empty(call.slots, call.in_features)
    if need_left:
        dleft = torch.empty_like(call.left, memory_format=DENSE)
    if need_right:
        dright = torch.empty_like(call.right, memory_format=DENSE)
    if need_central:
        dcentral = accumulator(call.central)
    for e, start, stop in groups:
        grad = upstream.rows(start, stop)
        blocks = (call.left[e], call.central, call.right[e])
        if dx is not None:
            weight = weights.weight(*blocks)
            torch.mm(grad, weight.T, out=dx[start:stop])
        if not any(need):
            continue
        rows = _rows(call.x, call.row_index, start, stop)
        torch.mm(rows.T, grad, out=weights.gradient())
        of_left, of_central, of_right = weights.of_blocks(*blocks, need)
        if dleft is not None and of_left is not None:
            dleft[e] = of_left.view(dleft.shape[1:])
        if dright is not None and of_right is not None:
            dright[e] = of_right.view(dright.shape[1:])
        if dcentral is not None and of_central is not None:
            dcentral += of_central.view(dcentral.shape)
    if dcentral is not None:
        dcentral = dcentral.to(call.central.dtype)
    return dx, dleft, dcentral, dright
