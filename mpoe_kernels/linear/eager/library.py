"""Grouped products by PyTorch's own kernel, and where it has one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear import grouped
from mpoe_kernels.linear.gradients import Backward, Forward, Slots
from mpoe_kernels.linear.grouped import BlocksProduct, RowsProduct

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall


class Library:
    """See `mpoe_kernels.linear.grouped.Grouped`; by `torch.nn.functional.grouped_mm`."""

    fuses = False

    def rows(self, product: RowsProduct) -> tuple[Tensor, None]:
        slots = product.slots
        out = product.out
        p = product.rows.shape[1]
        m = product.blocks.shape[2]
        a = _front(product.rows, product.row_index, slots).flatten(0, 1)
        b = _aligned(product.blocks, 1, 2)
        y = F.grouped_mm(_aligned(a, 1), b, offs=_ends(slots) * p)
        y = y[:, :m].reshape(slots.count, p, m)
        y = _back(y, slots)
        owned = slots.owned[:, None, None]
        if out is None:
            return torch.where(owned, y, 0), None
        out.copy_(torch.where(owned, y, out))
        return out, None

    def blocks(self, product: BlocksProduct) -> Tensor:
        slots = product.slots
        a = _front(product.rows, product.row_index, slots).flatten(0, 1)
        g = _front(product.grads, None, slots).flatten(0, 1)
        ends = _ends(slots) * product.rows.shape[1]
        d = F.grouped_mm(_aligned(a, 1).T, _aligned(g, 1), offs=ends)
        d = d[:, : a.shape[1], : g.shape[1]]
        busy = slots.busy[:, None, None]
        return torch.where(busy, d, 0)


def forward(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    return grouped.forward(call, Library())


def backward(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return grouped.backward(call, Library())


def is_able(plan: Contraction) -> bool:
    """Whether grouped_mm computes a contraction without reading the offsets on the CPU: it reads
    them for lack of a kernel, which PyTorch has for bfloat16 on NVIDIA's compute capabilities 9 and
    10."""
    if plan.dtype != torch.bfloat16 or torch.version.hip is not None:
        return False
    major, _ = torch.cuda.get_device_capability(plan.device)
    return major in (9, 10) and not grouped.counting_reasons(plan)


def _front(rows: Tensor, row_index: Tensor | None, slots: Slots) -> Tensor:
    """Rows of the slots, those of the experts first."""
    if slots.is_part:
        number = torch.arange(slots.count, device=rows.device)
        order = (number + slots.offsets[0]) % slots.count
        if row_index is not None:
            order = row_index[order]
        row_index = order
    if row_index is None:
        return rows
    return rows.index_select(0, row_index)


def _back(rows: Tensor, slots: Slots) -> Tensor:
    """Undoes `_front`."""
    if not slots.is_part:
        return rows
    number = torch.arange(slots.count, device=rows.device)
    order = (number - slots.offsets[0]) % slots.count
    return rows.index_select(0, order)


def _ends(slots: Slots) -> Tensor:
    """Where every expert's slots end if the first one's start at 0, int32."""
    return (slots.offsets[1:] - slots.offsets[0]).to(torch.int32)


def _aligned(t: Tensor, *dimensions: int) -> Tensor:
    """Padded with zeros to multiples of 16 bytes and dense, as grouped_mm requires."""
    padding = [0] * (2 * t.dim())
    multiple = 16 // t.element_size()
    for dimension in dimensions:
        # Pairs of the sides before and after, from the last dimension on.
        after = 2 * (t.dim() - 1 - dimension) + 1
        padding[after] = -t.shape[dimension] % multiple
    if any(padding):
        return F.pad(t, padding)
    # Of blocks it takes both layouts.
    if t.dim() == 3 and t.mT.is_contiguous():
        return t
    return t.contiguous()
