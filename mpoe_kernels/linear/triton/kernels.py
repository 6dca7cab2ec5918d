"""Grouped MPO linear by Triton's kernels, step by step or with weights kept on chip."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.gpu.operands import Operand, block, scratch
from mpoe_kernels.linear.gpu.primitives import Sum
from mpoe_kernels.linear.triton.fused_launch import block_gradients, rows_times_weight
from mpoe_kernels.linear.triton.launch import TritonLaunches, merge
from mpoe_kernels.linear.triton.plan import planned

Forward = tuple[Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward_by_steps(call: ForwardCall, wide: bool = False) -> Forward:
    """``(y, h, z)``, see `ForwardCall`.

    Args:
        wide: use wide tiles and descriptors for products of rows and whole weights.
    """
    return planned(_forward_by_steps, call, wide)


def forward_on_chip(call: ForwardCall, half: bool) -> Forward:
    """The same with weights that never leave the multiprocessor.

    Args:
        half: compute left · central of every expert in a separate launch.
    """
    return planned(_forward_on_chip, call, half)


def backward_by_steps(call: BackwardCall, wide: bool = False) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`; ``wide`` as above."""
    return planned(_backward_by_steps, call, wide, *_slots_to_sum(call))


def backward_on_chip(call: BackwardCall, half: bool) -> Backward:
    """The same with weights and their gradients that never leave the multiprocessor; ``half`` as above."""
    return planned(_backward_on_chip, call, half, *_slots_to_sum(call))


def _slots_to_sum(call: BackwardCall) -> tuple[Tensor, ...]:
    """`slots_by_token`, if the rows of a gradient of x must be summed and their slots are not given."""
    if call.row_index is None or call.slot_of_token is not None or not call.need[0]:
        return ()
    return slots_by_token(call.row_index, call.x.shape[0])


def _forward_by_steps(call: ForwardCall, wide: bool) -> Forward:
    return steps.forward_by_steps(call, TritonLaunches(wide=wide))


def _forward_on_chip(call: ForwardCall, half: bool) -> Forward:
    x = call.x
    y = x.new_empty(call.slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    rows_times_weight(call, x, y, half=_half_built(call) if half else None, pre=pre)
    return y, x.new_empty(0), x.new_empty(0) if pre is None else pre


def _backward_by_steps(call: BackwardCall, wide: bool, *by_token: Tensor) -> Backward:
    launches = TritonLaunches(by_token, wide)

    def gradients(call: BackwardCall, dz: Tensor, dx: Tensor | None) -> steps.Gradients:
        return steps.gradients_by_steps(call, launches, dz, dx, call.need_of_plan)

    return steps.backward(call, launches, gradients)


def _backward_on_chip(call: BackwardCall, half: bool, *by_token: Tensor) -> Backward:
    return steps.backward(call, TritonLaunches(by_token), partial(_gradients_on_chip, half=half))


def _gradients_on_chip(call: BackwardCall, dz: Tensor, dx: Tensor | None, half: bool) -> steps.Gradients:
    if dx is not None:
        rows_times_weight(call, dz, dx, half=_half_built(call) if half else None)
    return block_gradients(call, dz)


def _half_built(call: ForwardCall | BackwardCall) -> Operand:
    """left · central of every expert."""
    out = scratch("LC", call.num_experts, call.dims, call.x)
    merge(Sum(block(call.left, "L"), block(call.central, "C"), out, call.dims, call.expert_offsets))
    return out
