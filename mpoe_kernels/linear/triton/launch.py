"""Launches of the three GEMM families on named operands."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from mpoe_kernels.linear.triton.blocks import blocks_kernel
from mpoe_kernels.linear.triton.configs import Tile, launch_options, tile_for
from mpoe_kernels.linear.triton.operands import LAYOUTS, Operand, activations, index_map, scratch
from mpoe_kernels.linear.triton.outer import outer_kernel
from mpoe_kernels.linear.triton.rows import rows_kernel
from mpoe_kernels.planner import may_round_to_tf32
from mpoe_kernels.planner.orders import BlockDims
from mpoe_kernels.triton.start import cdiv, power_of_two, start


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as PyTorch is told to."""
    return "tf32" if may_round_to_tf32(dtype) else "ieee"


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 in the interpreter, whose programs run one after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def persistent_programs(device: torch.device, tiles: int) -> int:
    """A few programs per multiprocessor, no more than there are tiles."""
    return max(1, min(tiles, 2 * multiprocessors(device)))


def rows_times_block(
    rows: Operand,
    operand: Operand,
    dims: BlockDims,
    offsets: Tensor,
    slots: int,
    *,
    row_index: Tensor | None = None,
    out: Operand | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    pre: Tensor | None = None,
    tail: bool = True,
    tile: Tile | None = None,
) -> Operand:
    """Contract rows with every expert's block, or with the one block they share.

    Args:
        rows: activations; with ``row_index`` slot s reads row ``row_index[s]``.
        operand: block; its expert axis matches ``offsets``.
        offsets: ``[E + 1]`` slots of the experts, or the part of it that belongs to ``operand``'s experts.
        slots: N.
        out: where to; by default new memory.
        bias, activation: epilogue; ``pre`` receives the pre-activation.
        tail: clear the slots behind the last offset.

    Returns:
        ``out``: activations whose axes are those that only one operand has.
    """
    kept, new, shared = rows.axes - operand.axes, operand.axes - rows.axes, rows.axes & operand.axes
    if out is None:
        axes = [*_ordered(kept, rows), *_ordered(new, operand)]
        data = rows.data.new_empty(slots, dims.elements(kept | new))
        out = activations(data, tuple(axes), dims)
    m, k, n = (
        index_map(kept, dims, rows, out),
        index_map(shared, dims, rows, operand),
        index_map(new, dims, out, operand),
    )
    experts = offsets.shape[0] - 1
    grouped = operand.outer != 0
    if slots == 0:
        return out
    again = partial(
        rows_times_block, rows, operand, dims, offsets, slots, row_index=row_index, out=out, bias=bias,
        activation=activation, pre=pre, tail=tail,
    )  # fmt: skip
    rows_of_one = slots * m.extent / (experts if grouped else 1)
    tile = tile or tile_for("rows", rows.data, rows_of_one, n.extent, k.extent, lambda t: again(tile=t))
    segments = (experts if grouped else 1) + 1
    tiles = (cdiv(slots * m.extent, tile.m) + segments) * cdiv(n.extent, tile.n)
    dummy = out.data
    start(
        rows_kernel,
        (persistent_programs(rows.data.device, tiles),),
        a=rows.data,
        b=operand.data,
        out=out.data,
        bias=dummy if bias is None else bias,
        pre=dummy if pre is None else pre,
        row_index=dummy if row_index is None else row_index,
        offsets=offsets,
        slots=slots,
        A_SLOT=rows.outer,
        B_EXPERT=operand.outer,
        OUT_SLOT=out.outer,
        M=m.extent,
        K=k.extent,
        N=n.extent,
        M_SIZES=m.sizes,
        M_A=m.strides[0],
        M_OUT=m.strides[1],
        K_SIZES=k.sizes,
        K_A=k.strides[0],
        K_B=k.strides[1],
        N_SIZES=n.sizes,
        N_OUT=n.strides[0],
        N_B=n.strides[1],
        A_LIMIT=rows.limit,
        OUT_LIMIT=out.limit,
        EXPERTS=experts,
        GROUPED=grouped,
        SCAN=power_of_two(segments),
        TAIL=tail,
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        SAVE_PRE=pre is not None,
        PRECISION=precision(rows.data.dtype),
        **launch_options(tile),
    )
    return out


def block_gradient(
    rows: Operand,
    grads: Operand,
    name: str,
    dims: BlockDims,
    offsets: Tensor,
    *,
    row_index: Tensor | None = None,
    out: Operand | None = None,
    tile: Tile | None = None,
) -> Operand:
    """Gradient of the block ``name`` from the rows before it and the gradient of the rows after it.

    Returns:
        ``out``, or new memory ``[E, ...]``; of the shared central block the float32 sum over all slots, ``[1, ...]``.
    """
    axes = frozenset(LAYOUTS[name])
    shared = rows.axes & grads.axes
    experts, grouped = offsets.shape[0] - 1, name != "C" or (out is not None and out.outer != 0)
    m_axes, n_axes = axes & rows.axes, axes & grads.axes
    layout = out if out is not None else scratch(name, 0, dims, rows.data)
    m, n, s = (
        index_map(m_axes, dims, rows, layout),
        index_map(n_axes, dims, grads, layout),
        index_map(shared, dims, grads, rows),
    )
    again = partial(block_gradient, rows, grads, name, dims, offsets, row_index=row_index, out=out)
    tile = tile or tile_for(
        "outer", rows.data, m.extent, n.extent, s.extent * grads.data.shape[0], lambda t: again(tile=t)
    )
    mn_tiles = cdiv(m.extent, tile.m) * cdiv(n.extent, tile.n)
    splits = 1 if grouped else central_splits(rows.data.device, mn_tiles, grads.data.shape[0] * s.extent, tile)
    if out is None:
        like = rows.data if grouped else rows.data.new_empty(0, dtype=torch.float32)
        out = scratch(name, experts if grouped else splits, dims, like)
    start(
        outer_kernel,
        (mn_tiles, experts if grouped else splits),
        a=rows.data,
        g=grads.data,
        out=out.data,
        row_index=out.data if row_index is None else row_index,
        offsets=offsets,
        A_SLOT=rows.outer,
        G_SLOT=grads.outer,
        OUT_EXPERT=out.outer,
        S=s.extent,
        M=m.extent,
        N=n.extent,
        S_SIZES=s.sizes,
        S_G=s.strides[0],
        S_A=s.strides[1],
        M_SIZES=m.sizes,
        M_A=m.strides[0],
        M_OUT=m.strides[1],
        N_SIZES=n.sizes,
        N_G=n.strides[0],
        N_OUT=n.strides[1],
        A_LIMIT=rows.limit,
        G_LIMIT=grads.limit,
        EXPERTS=experts,
        GROUPED=grouped,
        HAS_INDEX=row_index is not None,
        PRECISION=precision(rows.data.dtype),
        **launch_options(tile),
    )
    return out if grouped else Operand(out.data.sum(0, keepdim=True), out.strides, 0)


def central_splits(device: torch.device, tiles: int, rows: int, tile: Tile) -> int:
    """Into how many partial sums the shared block's gradient is split: enough for all multiprocessors, at most 16."""
    return max(1, min(16, cdiv(2 * multiprocessors(device), tiles), rows // (4 * tile.k)))


def merge_blocks(
    first: Operand,
    second: Operand,
    out: Operand,
    dims: BlockDims,
    offsets: Tensor,
    *,
    accumulate: bool = False,
    tile: Tile | None = None,
) -> Operand:
    """Contract two blocks of every busy expert into ``out``; idle experts keep what ``out`` held.

    With ``accumulate``, ``out`` is float32 and shared by the experts: their products are added to it.
    """
    m, n, k = (
        index_map(first.axes - second.axes, dims, out, first),
        index_map(second.axes - first.axes, dims, out, second),
        index_map(first.axes & second.axes, dims, second, first),
    )
    experts = offsets.shape[0] - 1
    again = partial(merge_blocks, first, second, out, dims, offsets)
    repeat = None if accumulate else lambda t: again(tile=t)  # what is added must be added once
    tile = tile or tile_for("blocks", first.data, m.extent, n.extent, k.extent, repeat)
    grid = (cdiv(m.extent, tile.m) * cdiv(n.extent, tile.n), 1 if accumulate else experts)
    start(
        blocks_kernel,
        grid,
        p=first.data,
        q=second.data,
        out=out.data,
        offsets=offsets,
        experts=experts,
        P_EXPERT=first.outer,
        Q_EXPERT=second.outer,
        OUT_EXPERT=out.outer,
        M=m.extent,
        K=k.extent,
        N=n.extent,
        M_SIZES=m.sizes,
        M_OUT=m.strides[0],
        M_P=m.strides[1],
        K_SIZES=k.sizes,
        K_Q=k.strides[0],
        K_P=k.strides[1],
        N_SIZES=n.sizes,
        N_OUT=n.strides[0],
        N_Q=n.strides[1],
        SUM=accumulate,
        PRECISION=precision(first.data.dtype),
        **launch_options(tile),
    )
    return out


def _ordered(axes: frozenset[str], operand: Operand) -> list[str]:
    return sorted(axes, key=lambda axis: operand.strides[axis], reverse=True)
