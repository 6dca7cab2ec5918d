"""The strategy ``rebuild`` with the fused kernels: whether it pays, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.backends.triton.architecture import HARDWARE_NAMES
from mpoe_kernels.backends.triton.cost import gpu_seconds
from mpoe_kernels.backends.triton.fused_cost import fused_reasons, fused_seconds, use_half
from mpoe_kernels.backends.triton.fused_launch import Blocks, block_gradients, rows_times_weight
from mpoe_kernels.backends.triton.launch import merge_blocks
from mpoe_kernels.backends.triton.operands import Operand, block, scratch
from mpoe_kernels.backends.triton.start import target_of
from mpoe_kernels.planner import HARDWARE, BlockDims, Hardware, contraction, hardware_here
from mpoe_kernels.planner.program import Need


def _hardware(device: torch.device, architecture: str) -> Hardware:
    """Of a GPU that is here, else the one that stands for the architecture."""
    return hardware_here(device) if device.type == "cuda" else HARDWARE[HARDWARE_NAMES[architecture]]


def rebuilds_on_chip(like: Tensor, dims: BlockDims, experts: int, slots: int, phase: str, need: Need) -> bool:
    """Whether ``rebuild`` keeps its weights on chip: where it can, and is predicted to be faster than step by step."""
    target = target_of(like.device)
    if fused_reasons(dims, like.dtype, target):
        return False
    hardware = _hardware(like.device, target.architecture)
    plan = contraction("rebuild", dims, experts, slots, like.dtype, phase, need)
    return fused_seconds(plan, target, hardware) < gpu_seconds(plan, hardware)


def _half(
    like: Tensor, blocks: Blocks, offsets: Tensor, dims: BlockDims, slots: int, transposed: bool
) -> Operand | None:
    """left · central of every expert where making it in a launch of its own pays."""
    target, experts = target_of(like.device), offsets.shape[0] - 1
    hardware = _hardware(like.device, target.architecture)
    if not use_half(dims, transposed, experts, slots, like.dtype, target, hardware):
        return None
    out = scratch("LC", experts, dims, like)
    return merge_blocks(block(blocks.left, "L"), block(blocks.central, "C"), out, dims, offsets)


def forward_on_chip(
    x: Tensor,
    blocks: Blocks,
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    y: Tensor,
    *,
    bias: Tensor | None,
    activation: str,
    pre: Tensor | None,
) -> None:
    """Write ``y [N, F]``, and ``pre`` if given."""
    half = _half(x, blocks, offsets, dims, y.shape[0], transposed=False)
    rows_times_weight(
        x, blocks, offsets, y, dims, half=half, row_index=row_index, bias=bias, activation=activation, pre=pre
    )


def backward_on_chip(
    dz: Tensor,
    x: Tensor,
    blocks: Blocks,
    offsets: Tensor,
    row_index: Tensor | None,
    dims: BlockDims,
    need: tuple[bool, bool, bool],
    dx: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Write ``dx [N, I]`` if given; returns the gradients of left, central and right that ``need`` asks for."""
    if dx is not None:
        half = _half(x, blocks, offsets, dims, dz.shape[0], transposed=True)
        rows_times_weight(dz, blocks, offsets, dx, dims, transposed=True, half=half)
    return block_gradients(x, dz, blocks, offsets, dims, need, row_index=row_index)
