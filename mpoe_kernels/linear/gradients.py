"""Gradients of the blocks by kernels that keep the gradient of a weight on chip, for Triton and CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.linear.grouped import Slots, experts_at_once, float32_mm

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall


def block_gradients(
    call: BackwardCall, dz: Tensor, times: Callable[[BackwardCall, Tensor, Tensor, bool, Slots], Tensor]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of left, central and right that are needed, by a kernel that keeps the gradient of a weight on chip.

    It multiplies ``dW_e = x^T dz`` by right, which gives the gradient of left · central, or by left · central, which
    gives the gradient of right. The rest is shared products. Some experts' left · central exist at a time.

    Args:
        call: of the op.
        dz: ``[N, F]``.
        times: function of call, dz, right ``[E, b, iR, jR]`` or left · central ``[E, iL, jL, iC, jC, b]`` of some
            experts, whether it is the latter, and their slots; returns the product in the shape of the other one.
    """
    d, experts, (_, need_left, need_central, need_right) = call.dims, call.num_experts, call.need_of_plan
    central, parts = call.central.reshape(d.a, -1), {name: list[Tensor]() for name in "LCR"}
    size = experts_at_once(d, ("LC",), experts, copies=1)
    for first in range(0, experts if need_left or need_central or need_right else 0, size):
        last = min(first + size, experts)
        slots = Slots(call.expert_offsets[first : last + 1], call.slots, size < experts)
        left = torch.where(slots.busy[:, None, None, None], call.left[first:last], 0).view(-1, d.a)
        if need_left or need_central:
            half = times(call, dz, call.right[first:last], False, slots).view(left.shape[0], central.shape[1])
            parts["L"] += [half @ central.T] if need_left else []
            parts["C"] += [float32_mm(left.T, half)] if need_central else []
        if need_right:
            half = (left @ central).view(last - first, d.iL, d.jL, d.iC, d.jC, d.b)
            parts["R"].append(times(call, dz, half, True, slots))
    dleft = torch.cat(parts["L"]).view(call.left.shape) if need_left else None
    dcentral = torch.stack(parts["C"]).sum(0).to(dz.dtype).view(call.central.shape) if need_central else None
    return dleft, dcentral, torch.cat(parts["R"]).to(dz.dtype) if need_right else None
