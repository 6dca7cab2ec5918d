"""Grouped MPO linear by Triton's kernels, step by step or with weights kept on chip."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.linear.gpu import steps
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton.fused_launch import block_gradients, rows_times_weight
from mpoe_kernels.linear.triton.gemm_launches import LAUNCHES

Forward = tuple[Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def forward_by_steps(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    return steps.forward_by_steps(steps.prepared(call), LAUNCHES)


def forward_on_chip(call: ForwardCall) -> Forward:
    """The same with weights that never leave the multiprocessor."""
    call, x = steps.prepared(call), call.x
    y = x.new_empty(call.slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    rows_times_weight(call, call.x, y, pre=pre)
    return y, x.new_empty(0), x.new_empty(0) if pre is None else pre


def backward_by_steps(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""

    def gradients(call: BackwardCall, dz: Tensor, dx: Tensor | None) -> steps.Gradients:
        return steps.gradients_by_steps(call, LAUNCHES, dz, dx, call.need_of_plan)

    return steps.backward(steps.prepared(call), LAUNCHES, gradients)


def backward_on_chip(call: BackwardCall) -> Backward:
    """The same with weights and their gradients that never leave the multiprocessor."""

    def gradients(call: BackwardCall, dz: Tensor, dx: Tensor | None) -> steps.Gradients:
        if dx is not None:
            rows_times_weight(call, dz, dx)
        return block_gradients(call, dz)

    return steps.backward(steps.prepared(call), LAUNCHES, gradients)
