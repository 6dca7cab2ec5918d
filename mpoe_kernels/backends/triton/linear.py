"""Grouped MPO linear: strategy, epilogue and gradients, from the kernel families."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.linear_call import BackwardCall, ForwardCall
from mpoe_kernels.backends.triton.contraction import BlockGradients, Pass, blocks_of, x_rows, y_rows
from mpoe_kernels.backends.triton.fused_launch import Blocks
from mpoe_kernels.backends.triton.on_chip import backward_on_chip, forward_on_chip, rebuilds_on_chip
from mpoe_kernels.backends.triton.operands import activations
from mpoe_kernels.backends.triton.pointwise import activation_backward, sum_rows_by_token
from mpoe_kernels.engine.driver import run
from mpoe_kernels.planner import ALL_GRADIENTS, program_of
from mpoe_kernels.planner.program import KEPT


def _unit_columns(t: Tensor) -> Tensor:
    """The kernels read rows of contiguous columns."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def linear_forward(call: ForwardCall, on_chip: bool | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`.

    ``on_chip``: whether ``rebuild`` uses the fused kernels; by default where they are predicted to be faster.
    """
    x, dims, slots = _unit_columns(call.x), call.dims, call.slots
    y = x.new_empty(slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    h = x.new_empty(slots * dims.jC, dims.b) if call.saves_h else None
    if on_chip is None:
        on_chip = call.strategy == "rebuild" and rebuilds_on_chip(
            x, dims, call.num_experts, slots, "forward", ALL_GRADIENTS
        )
    common = (call.expert_offsets, call.row_index, dims)
    if on_chip:
        forward_on_chip(x, Blocks(*call.blocks), *common, y, bias=call.bias, activation=call.activation, pre=pre)
    else:
        program = program_of(dims, call.strategy, "forward")
        values = {"x": x_rows(x, dims), "y": y_rows(y, dims), **blocks_of(*call.blocks)}
        if h is not None:
            values[KEPT] = activations(h.view(slots, dims.jC * dims.b), program.axes[KEPT], dims)
        whole = Pass(program, dims, call.expert_offsets, slots, values, call.row_index, call.bias, call.activation, pre)
        run(program, whole.chunks())
    return y, x.new_empty(0) if h is None else h, x.new_empty(0) if pre is None else pre


def linear_backward(call: BackwardCall, on_chip: bool | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`. ``on_chip`` as above."""
    grad, dims, need, slots = call.grad, call.dims, call.need_of_plan, call.slots
    x, blocks = _unit_columns(call.x), Blocks(*call.blocks)
    dz, dbias = activation_backward(grad.contiguous(), call.saved, call.expert_offsets, call.activation, call.need[4])
    dx = grad.new_empty(slots, call.in_features) if need[0] else None
    if on_chip is None:
        on_chip = call.strategy == "rebuild" and rebuilds_on_chip(x, dims, call.num_experts, slots, "backward", need)
    common = (dz, x, blocks, call.expert_offsets, call.row_index, dims)
    if not any(need):
        parts: tuple[Tensor | None, ...] = (None, None, None)
    elif on_chip:
        parts = backward_on_chip(*common, need[1:], dx)
    else:
        parts = _backward_by_steps(call, dz, x, dx)
    if dx is not None and call.row_index is not None:
        dx = sum_rows_by_token(dx, call.row_index, x.shape[0])
    results = [grad.new_empty(0) if part is None else part for part in (dx, *parts, dbias)]
    return results[0], results[1], results[2], results[3], results[4]


def _backward_by_steps(
    call: BackwardCall, dz: Tensor, x: Tensor, dx: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write ``dx`` if given; returns the gradients of left, central and right that are needed."""
    dims, h = call.dims, call.saved_h
    program = program_of(dims, call.strategy, "backward", call.need_of_plan, kept=h is not None)
    grads = BlockGradients.zeros(*call.blocks, call.need_of_plan[1:])
    values = {"x": x_rows(x, dims), "d y": y_rows(dz, dims), **blocks_of(*call.blocks), **grads.operands()}
    if dx is not None:
        values["d x"] = x_rows(dx, dims)
    if h is not None:
        values[KEPT] = activations(h.view(call.slots, dims.jC * dims.b), program.axes[KEPT], dims)
    run(program, Pass(program, dims, call.expert_offsets, call.slots, values, call.row_index).chunks())
    return grads.results(call.central.dtype)
