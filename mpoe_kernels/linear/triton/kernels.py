"""Grouped MPO linear: epilogue and gradients around the kernel families, step by step or with weights kept on chip."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mpoe_kernels.engine.driver import run
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton.fused_launch import Blocks, block_gradients, rows_times_weight
from mpoe_kernels.linear.triton.launch import merge_blocks
from mpoe_kernels.linear.triton.operands import Operand, activations, block, scratch
from mpoe_kernels.linear.triton.products import BlockGradients, Pass, blocks_of, x_rows, y_rows
from mpoe_kernels.planner import program_of
from mpoe_kernels.planner.program import KEPT
from mpoe_kernels.triton.pointwise import activation_backward, sum_rows_by_token

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _unit_columns(t: Tensor) -> Tensor:
    """The kernels read rows of contiguous columns."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def forward_by_steps(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`; every product of the program is a launch."""
    x, dims, slots = _unit_columns(call.x), call.dims, call.slots
    y = x.new_empty(slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    h = x.new_empty(slots * dims.jC, dims.b) if call.saves_h else None
    program = program_of(dims, call.strategy, "forward")
    values = {"x": x_rows(x, dims), "y": y_rows(y, dims), **blocks_of(*call.blocks)}
    if h is not None:
        values[KEPT] = activations(h.view(slots, dims.jC * dims.b), program.axes[KEPT], dims)
    whole = Pass(program, dims, call.expert_offsets, slots, values, call.row_index, call.bias, call.activation, pre)
    run(program, whole.chunks())
    return y, x.new_empty(0) if h is None else h, x.new_empty(0) if pre is None else pre


def forward_on_chip(call: ForwardCall, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same with weights that never leave the multiprocessor.

    Args:
        half: make left · central of every expert in a launch of its own.
    """
    x = _unit_columns(call.x)
    y = x.new_empty(call.slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    rows_times_weight(
        x,
        Blocks(*call.blocks),
        call.expert_offsets,
        y,
        call.dims,
        half=_half_built(call) if half else None,
        row_index=call.row_index,
        bias=call.bias,
        activation=call.activation,
        pre=pre,
    )
    return y, x.new_empty(0), x.new_empty(0) if pre is None else pre


def backward_by_steps(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return _backward(call, _gradients_by_steps)


def backward_on_chip(call: BackwardCall, half: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same with weights and their gradients that never leave the multiprocessor; ``half`` as above."""
    return _backward(call, partial(_gradients_on_chip, half=half))


def _backward(
    call: BackwardCall, gradients: Callable[[BackwardCall, Tensor, Tensor, Tensor | None], Gradients]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Through the activation, then ``gradients`` writes dx (by slot) and returns those of the blocks."""
    grad, need = call.grad, call.need_of_plan
    x = _unit_columns(call.x)
    dz, dbias = activation_backward(grad.contiguous(), call.saved, call.expert_offsets, call.activation, call.need[4])
    dx = grad.new_empty(call.slots, call.in_features) if need[0] else None
    parts = gradients(call, dz, x, dx) if any(need) else (None, None, None)
    if dx is not None and call.row_index is not None:
        dx = sum_rows_by_token(dx, call.row_index, x.shape[0])
    results = [grad.new_empty(0) if part is None else part for part in (dx, *parts, dbias)]
    return results[0], results[1], results[2], results[3], results[4]


def _gradients_by_steps(call: BackwardCall, dz: Tensor, x: Tensor, dx: Tensor | None) -> Gradients:
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


def _gradients_on_chip(call: BackwardCall, dz: Tensor, x: Tensor, dx: Tensor | None, half: bool) -> Gradients:
    blocks, offsets, dims = Blocks(*call.blocks), call.expert_offsets, call.dims
    if dx is not None:
        built = _half_built(call) if half else None
        rows_times_weight(dz, blocks, offsets, dx, dims, transposed=True, half=built)
    return block_gradients(x, dz, blocks, offsets, dims, call.need_of_plan[1:], row_index=call.row_index)


def _half_built(call: ForwardCall | BackwardCall) -> Operand:
    """left · central of every expert."""
    out = scratch("LC", call.num_experts, call.dims, call.x)
    return merge_blocks(block(call.left, "L"), block(call.central, "C"), out, call.dims, call.expert_offsets)
