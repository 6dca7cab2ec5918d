"""The products of a program with PyTorch's own GEMMs, mainly `torch.nn.functional.grouped_mm`, without synchronisation.

Everything, including offsets, is computed on the device; weights are built within the budget, see
`mpoe_kernels.linear.gpu.budget.experts_at_once`. Operands are copied into the layout that a GEMM needs, which our own
kernels would avoid; in return these are the vendor's GEMMs. It also runs on CPUs, in tests.

quack's grouped GEMMs (``quack.gemm_interface.gemm`` with ``cu_seqlens_m``, quack-kernels 0.6.5) take the same operands,
but run only on GPUs: until they have been compared with the reference on one, they are not a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.eager.activation import ACTIVATION, ACTIVATION_GRADIENT
from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.operands import Operand
from mpoe_kernels.linear.gpu.primitives import Rows, Sum
from mpoe_kernels.linear.gpu.products import Pass, walk

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall


def forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`."""
    return steps.forward_by_steps(steps.prepared(call), LIBRARY)


def backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return steps.backward(steps.prepared(call), LIBRARY, _gradients)


def _gradients(call: BackwardCall, dz: Tensor, dx: Tensor | None) -> steps.Gradients:
    return steps.gradients_by_steps(call, LIBRARY, dz, dx, call.need_of_plan)


class _Slots:
    """The slots of some experts, moved to the front: those of ``offsets [E + 1]``, which need not start at 0.

    Attributes:
        ends: int32 ``[E]``, where each expert's slots end if the first one's start at 0.
    """

    def __init__(self, offsets: Tensor, count: int) -> None:
        self.first, self.last = offsets[0], offsets[-1]
        self.ends, self.count = (offsets[1:] - self.first).to(torch.int32), count
        # A part of the experts; for all experts, the slots are already in front.
        self.is_part = offsets.storage_offset() != 0
        self.number = torch.arange(count, device=offsets.device)
        self.busy = offsets[1:] > offsets[:-1]

    def front(self, rows: Tensor, row_index: Tensor | None) -> Tensor:
        """Rows of the slots, those of the experts first."""
        if self.is_part:
            order = (self.number + self.first) % max(self.count, 1)
            row_index = order if row_index is None else row_index[order]
        return rows if row_index is None else rows.index_select(0, row_index)

    def back(self, rows: Tensor) -> Tensor:
        """Undoes `front`."""
        return rows.index_select(0, (self.number - self.first) % max(self.count, 1)) if self.is_part else rows

    def write(self, rows: Tensor, out: Tensor) -> None:
        """Rows in slot order: those of earlier experts stay, those of later ones become zero."""
        value = torch.where((self.number < self.last)[:, None], rows, 0)
        out.copy_(torch.where((self.number < self.first)[:, None], out, value) if self.is_part else value)

    def only(self, rows: Tensor) -> Tensor:
        """Rows in front, zeros behind them."""
        return torch.where((self.number < self.last - self.first)[:, None], rows, 0)


def _ordered(axes: Iterable[str], operand: Operand) -> tuple[str, ...]:
    """Slowest first."""
    return tuple(sorted(axes, key=lambda axis: -operand.strides[axis]))


def _sizes(axes: Iterable[str], dims: BlockDims) -> list[int]:
    return [getattr(dims, axis) for axis in axes]


def _as_axes(operand: Operand, axes: tuple[str, ...], dims: BlockDims) -> Tensor:
    """``[outer, *axes]``: a view; the outer axis of a shared block has size 1."""
    data, strides = operand.data, [operand.strides[axis] for axis in axes]
    count = data.shape[0] if operand.outer else 1
    return data.as_strided((count, *_sizes(axes, dims)), (operand.outer, *strides), data.storage_offset())


def _block(operand: Operand, first: tuple[str, ...], second: tuple[str, ...], dims: BlockDims) -> Tensor:
    """``[E or 1, first, second]``."""
    view = _as_axes(operand, (*first, *second), dims)
    return view.reshape(view.shape[0], math.prod(_sizes(first, dims)), math.prod(_sizes(second, dims)))


def _rows(rows: Tensor, operand: Operand, first: tuple[str, ...], second: tuple[str, ...], dims: BlockDims) -> Tensor:
    """``[N first, second]`` of rows ``[N, columns]`` in the layout of ``operand``."""
    axes = _ordered(operand.axes, operand)
    columns = math.prod(_sizes(axes, dims))
    if operand.limit:
        rows = F.pad(rows, (0, columns - operand.limit))
    places = [1 + axes.index(axis) for axis in (*first, *second)]
    view = rows.reshape(rows.shape[0], *_sizes(axes, dims)).permute(0, *places)
    return view.reshape(rows.shape[0] * math.prod(_sizes(first, dims)), math.prod(_sizes(second, dims)))


def _columns(found: Tensor, axes: tuple[str, ...], out: Operand, dims: BlockDims) -> Tensor:
    """``[N, *axes] -> [N, columns]`` as ``out`` has them, the true ones only."""
    places = [1 + axes.index(axis) for axis in _ordered(axes, out)]
    rows = found.permute(0, *places).reshape(found.shape[0], math.prod(found.shape[1:]))
    return rows[:, : out.limit] if out.limit else rows


def _multiple(t: Tensor, *dimensions: int) -> Tensor:
    """Padded with zeros to multiples of 16 bytes, as grouped_mm requires for strides."""
    step = 16 // t.element_size()
    padding = [0] * (2 * t.dim())
    for dimension in dimensions:
        padding[2 * (t.dim() - 1 - dimension) + 1] = -t.shape[dimension] % step
    return F.pad(t, padding) if any(padding) else t


def _float32_mm(first: Tensor, second: Tensor) -> Tensor:
    """The product, accumulated and returned in float32."""
    if first.dtype == torch.float32:
        return first @ second
    return torch.mm(first, second, out_dtype=torch.float32) if first.is_cuda else first.float() @ second.float()


class GroupedLaunches:
    """See `mpoe_kernels.linear.gpu.primitives`: both the primitives and the operations around them."""

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """All products add in float32."""
        return torch.zeros(block.shape, dtype=torch.float32, device=block.device)

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total.to(dtype)

    def compute(self, whole: Pass) -> None:
        """Product after product."""
        walk(whole, self)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory from PyTorch."""
        return like.new_empty(rows, columns)

    def rows(self, product: Rows) -> None:
        """See `mpoe_kernels.linear.gpu.primitives.Primitives`; slots past the last offset always become zero."""
        rows, block, out, dims, slots = product.first, product.second, product.out, product.dims, product.slots
        kept, new = _ordered(product.first_alone, rows), _ordered(product.second_alone, out)
        shared = _ordered(product.summed, block)
        here = _Slots(product.offsets, slots)
        a = _rows(here.front(rows.data, product.row_index), rows, kept, shared, dims)
        b = _block(block, shared, new, dims)
        if block.outer:
            factor, columns = math.prod(_sizes(kept, dims)), b.shape[2]
            found = F.grouped_mm(_multiple(a, 1), _multiple(b, 1, 2), offs=here.ends * factor)[:, :columns]
        else:
            found = a @ b[0]
        found = found.reshape(slots, *_sizes((*kept, *new), dims))
        z = here.back(_columns(found, (*kept, *new), out, dims))
        if product.bias is not None:
            z = z + product.bias
        if product.pre is not None:
            here.write(z, product.pre)
        here.write(ACTIVATION[product.activation](z), out.data)

    def gradient(self, product: Sum) -> None:
        """See `mpoe_kernels.linear.gpu.primitives.Primitives`."""
        rows, grads, out, dims = product.first, product.second, product.out, product.dims
        shared, slots = _ordered(product.summed, rows), grads.data.shape[0]
        m, n = _ordered(out.axes & rows.axes, out), _ordered(out.axes & grads.axes, out)
        here = _Slots(product.offsets, slots)
        a = _rows(here.front(rows.data, product.row_index), rows, shared, m, dims)
        front = here.front(grads.data, None)
        sizes = _sizes((*m, *n), dims)
        view = _as_axes(out, (*m, *n), dims)
        if product.shared:  # rows after the last expert's must not count, whatever they contain
            g = _rows(here.only(front), grads, shared, n, dims)
            a = torch.where(_repeat(here, a.shape[0] // max(slots, 1))[:, None], a, 0)
            view += _float32_mm(a.T, g).view(1, *sizes)
        else:
            g, ends = _rows(front, grads, shared, n, dims), here.ends * math.prod(_sizes(shared, dims))
            found = F.grouped_mm(_multiple(a, 1).T, _multiple(g, 1), offs=ends)[:, : a.shape[1], : g.shape[1]]
            view.copy_(torch.where(here.busy[:, None, None], found, 0).reshape(-1, *sizes))

    def merge(self, product: Sum) -> None:
        """See `mpoe_kernels.linear.gpu.primitives.Primitives`; gives zeros for idle experts."""
        first, second, out, dims, offsets = product.first, product.second, product.out, product.dims, product.offsets
        m, n = _ordered(product.first_alone, out), _ordered(product.second_alone, out)
        k = _ordered(product.summed, second)
        busy = (offsets[1:] > offsets[:-1])[:, None, None]
        p, q = _block(first, m, k, dims), _block(second, k, n, dims)
        # An idle expert's memory may contain anything, and zero times that need not be zero.
        p = torch.where(busy, p, 0) if first.outer else p
        q = torch.where(busy, q, 0) if second.outer else q
        view = _as_axes(out, (*m, *n), dims)
        if product.shared:
            total = _float32_mm(p.transpose(0, 1).reshape(p.shape[1], -1), q.reshape(-1, q.shape[2]))
            view += total.view(view.shape)
        else:
            view.copy_((p @ q).view(view.shape))

    def activation_backward(
        self, grad: Tensor, saved: Tensor, offsets: Tensor, activation: str, need_bias: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `mpoe_kernels.linear.gpu.primitives.Surrounding`."""
        dz = ACTIVATION_GRADIENT[activation](grad, saved)
        if not need_bias:
            return dz, None
        inside = torch.arange(grad.shape[0], device=grad.device) < offsets[-1]
        total = torch.where(inside[:, None], dz, 0).sum(0, dtype=torch.float32)
        return dz, total.to(grad.dtype)

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """See `mpoe_kernels.linear.gpu.primitives.Surrounding`; by sorting, because atomics would add in arbitrary
        order."""
        return rows.new_zeros(tokens, rows.shape[1]).index_put_((row_index,), rows, accumulate=True)

    def collect_rows(self, rows: Tensor, slot_of_token: Tensor) -> Tensor:
        """See `mpoe_kernels.linear.gpu.primitives.Surrounding`."""
        found = rows.index_select(0, slot_of_token.clamp_min(0).flatten()).view(*slot_of_token.shape, rows.shape[1])
        found = torch.where(slot_of_token[:, :, None] >= 0, found, 0)
        return found[:, 0] if found.shape[1] == 1 else found.sum(1, dtype=torch.float32).to(rows.dtype)


def _repeat(here: _Slots, times: int) -> Tensor:
    """Which rows count, with several rows per slot."""
    return (here.number < here.last - here.first).repeat_interleave(times)


LIBRARY = GroupedLaunches()
