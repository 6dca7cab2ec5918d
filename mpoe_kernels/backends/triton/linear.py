"""Grouped MPO linear: strategy, epilogue and gradients, from the kernel families."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.triton.contraction import backward, central_accumulator, forward, operands_of
from mpoe_kernels.backends.triton.fused_launch import Blocks
from mpoe_kernels.backends.triton.on_chip import backward_on_chip, forward_on_chip, rebuilds_on_chip
from mpoe_kernels.backends.triton.operands import Operand, block
from mpoe_kernels.backends.triton.pointwise import activation_backward, sum_rows_by_token
from mpoe_kernels.planner import ALL_GRADIENTS, BlockDims


def _unit_columns(t: Tensor) -> Tensor:
    """The kernels read rows of contiguous columns."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def linear_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    bias: Tensor | None,
    row_index: Tensor | None,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    save: bool,
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y [N, F], h, z)``; ``h`` and ``z`` are empty unless backward will need them.

    ``on_chip``: whether ``rebuild`` uses the fused kernels; by default where they are predicted to be faster.
    """
    dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    y = x.new_empty(slots, out_features)
    keep_z = save and activation not in ("none", "relu")
    keep_h = save and strategy == "separable"
    pre = torch.empty_like(y) if keep_z else None
    h = x.new_empty(slots * (dims.jC if keep_h else 0), dims.b) if keep_h else x.new_empty(0)
    if on_chip is None:
        experts = left.shape[0]
        on_chip = strategy == "rebuild" and rebuilds_on_chip(x, dims, experts, slots, "forward", ALL_GRADIENTS)
    if on_chip:
        blocks = Blocks(left, central, right)
        forward_on_chip(
            _unit_columns(x), blocks, expert_offsets, row_index, dims, y, bias=bias, activation=activation, pre=pre
        )
    else:
        forward(
            _unit_columns(x),
            operands_of(left, central, right),
            expert_offsets,
            row_index,
            dims,
            strategy,
            y,
            bias=bias,
            activation=activation,
            pre=pre,
            h=h.view(slots, dims.jC * dims.b) if keep_h else None,
        )
    return y, h, x.new_empty(0) if pre is None else pre


def linear_backward(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    expert_offsets: Tensor,
    row_index: Tensor | None,
    h: Tensor,
    saved: Tensor,
    in_features: int,
    out_features: int,
    activation: str,
    strategy: str,
    need: list[bool],
    on_chip: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``; ``need`` says which, the others are empty. ``on_chip`` as above."""
    dims = BlockDims.of_blocks(left, central, right, in_features, out_features)
    need_x, need_left, need_central, need_right, need_bias = need
    x, slots = _unit_columns(x), grad.shape[0]
    dz, dbias = activation_backward(grad.contiguous(), saved, expert_offsets, activation, need_bias)
    dx = grad.new_empty(slots, in_features) if need_x else None
    if on_chip is None:
        four = (need_x, need_left, need_central, need_right)
        on_chip = strategy == "rebuild" and rebuilds_on_chip(x, dims, left.shape[0], slots, "backward", four)
    needed = (need_left, need_central, need_right)
    blocks = Blocks(left, central, right)
    if not any(needed) and dx is None:
        parts: tuple[Tensor | None, ...] = (None, None, None)
    elif on_chip:
        parts = backward_on_chip(dz, x, blocks, expert_offsets, row_index, dims, needed, dx)
    else:
        saved_h = h.view(slots, -1) if strategy == "separable" and h.numel() else None
        parts = _backward_by_steps(dz, x, blocks, expert_offsets, row_index, dims, strategy, needed, dx, saved_h)
    if dx is not None and row_index is not None:
        dx = sum_rows_by_token(dx, row_index, x.shape[0])
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
