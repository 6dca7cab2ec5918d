"""Grouped MPO linear: strategy, epilogue and gradients, from the kernel families."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.linear_call import BackwardCall, ForwardCall
from mpoe_kernels.backends.triton.contraction import backward, central_accumulator, forward, operands_of
from mpoe_kernels.backends.triton.fused_launch import Blocks
from mpoe_kernels.backends.triton.on_chip import backward_on_chip, forward_on_chip, rebuilds_on_chip
from mpoe_kernels.backends.triton.operands import Operand, block
from mpoe_kernels.backends.triton.pointwise import activation_backward, sum_rows_by_token
from mpoe_kernels.planner import ALL_GRADIENTS, BlockDims


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
        forward(
            *(x, operands_of(*call.blocks), *common, call.strategy, y),
            bias=call.bias,
            activation=call.activation,
            pre=pre,
            h=None if h is None else h.view(slots, dims.jC * dims.b),
        )
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
        h = None if call.saved_h is None else call.saved_h.view(slots, -1)
        parts = _backward_by_steps(*common, call.strategy, need[1:], dx, h)
    if dx is not None and call.row_index is not None:
        dx = sum_rows_by_token(dx, call.row_index, x.shape[0])
    results = [grad.new_empty(0) if part is None else part for part in (dx, *parts, dbias)]
    return results[0], results[1], results[2], results[3], results[4]


def _backward_by_steps(
    dz: Tensor,
    x: Tensor,
    blocks: Blocks,
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    strategy: str,
    need: tuple[bool, bool, bool],
    dx: Tensor | None,
    h: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write ``dx`` if given; returns the gradients of left, central and right that ``need`` asks for."""
    left, central, right = blocks
    # Zeros, because experts without slots get no gradient.
    dleft = torch.zeros(left.shape, dtype=left.dtype, device=left.device) if need[0] else None
    accumulator = central_accumulator(central) if need[1] else None
    dright = torch.zeros(right.shape, dtype=right.dtype, device=right.device) if need[2] else None
    grads: dict[str, Operand] = {}
    if dleft is not None:
        grads["L"] = block(dleft, "L")
    if accumulator is not None:
        grads["C"] = accumulator
    if dright is not None:
        grads["R"] = block(dright, "R")
    backward(dz, x, operands_of(*blocks), offsets, row_index, dims, strategy, grads, dx, h)
    dcentral = None if accumulator is None else accumulator.data.to(central.dtype)
    return dleft, dcentral, dright
