"""Launches of the three GEMM families on named operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpoe_kernels.indices import slots_by_token
from mpoe_kernels.linear.gpu.operands import Operand, index_map
from mpoe_kernels.linear.gpu.products import Pass, walk
from mpoe_kernels.linear.gpu.work import MOST_SPLITS, Work
from mpoe_kernels.linear.triton.blocks import blocks_kernel
from mpoe_kernels.linear.triton.configs import Tile, launch_options, tile_for
from mpoe_kernels.linear.triton.outer import outer_kernel
from mpoe_kernels.linear.triton.rows import rows_kernel
from mpoe_kernels.linear.triton.weights_launch import weight_of_blocks
from mpoe_kernels.planner.orders import AXES, BlockDims
from mpoe_kernels.routing.triton import dispatch_backward
from mpoe_kernels.triton.card import card, multiprocessors, precision
from mpoe_kernels.triton.pointwise import activation_backward, sum_parts, sum_rows
from mpoe_kernels.triton.start import cdiv, device_of, power_of_two, start


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
    out: Operand,
    row_index: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    pre: Tensor | None = None,
    tail: bool = True,
    tile: Tile | None = None,
) -> Operand:
    """See `mpoe_kernels.linear.gpu.products.Primitives`."""
    kept, new, shared = rows.axes - operand.axes, operand.axes - rows.axes, rows.axes & operand.axes
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
        (persistent_programs(device_of(rows.data), tiles),),
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
    out: Operand,
    row_index: Tensor | None = None,
    add: bool = False,
    room: int | None = None,
    tile: Tile | None = None,
) -> Operand:
    """See `mpoe_kernels.linear.gpu.products.Primitives`; an ``out`` that experts share is dense."""
    axes = frozenset(AXES[name])
    shared = rows.axes & grads.axes
    experts, grouped = offsets.shape[0] - 1, out.outer != 0
    m, n, s = (
        index_map(axes & rows.axes, dims, rows, out),
        index_map(axes & grads.axes, dims, grads, out),
        index_map(shared, dims, grads, rows),
    )

    def again(tile: Tile) -> Operand:
        to = replace(out, data=torch.empty_like(out.data)) if add else out  # what is added must be added once
        return block_gradient(rows, grads, name, dims, offsets, row_index=row_index, out=to, room=room, tile=tile)

    groups, inner = experts if grouped else 1, grads.data.shape[0] * s.extent
    work = Work(m.extent, n.extent, inner / groups, groups, out.data.numel(), rows.data.dtype)
    tile, splits = _cut("outer", rows.data, work, inner, out, room, again, tile)
    mn_tiles = work.programs((tile.m, tile.n, tile.k)) // groups
    whole = splits == 1 and (grouped or not add)
    found = out.data if whole else _partial(out, splits)
    start(
        outer_kernel,
        (mn_tiles, groups * splits),
        a=rows.data,
        g=grads.data,
        out=found,
        row_index=found if row_index is None else row_index,
        offsets=offsets,
        A_SLOT=rows.outer,
        G_SLOT=grads.outer,
        OUT_EXPERT=out.outer or out.data.numel(),
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
        SPLITS=splits,
        HAS_INDEX=row_index is not None,
        PRECISION=precision(rows.data.dtype),
        **launch_options(tile),
    )
    if not whole:
        sum_parts(found, out.data, add and not grouped)
    return out


def _cut(
    kernel: str,
    like: Tensor,
    work: Work,
    inner: float,
    out: Operand,
    room: int | None,
    launch: Callable[[Tile], object] | None,
    tile: Tile | None,
) -> tuple[Tile, int]:
    """Tile of a kernel that can split its inner size, and into how many parts it does.

    Partial sums stay within ``room`` bytes; a result that does not lie together cannot be summed. ``inner``: size by
    which a measured tile is kept. ``tile``: take this one.
    """
    hardware, most = card(device_of(like)), MOST_SPLITS
    if room is not None:
        most = room // (4 * max(work.elements, 1))
    if not out.data.is_contiguous():
        most = 1

    def best(tiles: tuple[Tile, ...]) -> Tile:
        sizes = [(tile.m, tile.n, tile.k) for tile in tiles]
        return tiles[sizes.index(work.best_tile(sizes, hardware, most))]

    tile = tile or tile_for(kernel, like, work.m, work.n, inner, launch, best)
    return tile, work.best_splits((tile.m, tile.n, tile.k), hardware, most)


def _partial(out: Operand, splits: int) -> Tensor:
    """Memory for results of every part."""
    return torch.empty(splits, *out.data.shape, dtype=torch.float32, device=out.data.device)


def merge_blocks(
    first: Operand,
    second: Operand,
    out: Operand,
    dims: BlockDims,
    offsets: Tensor,
    *,
    shared: bool = False,
    clear: bool = False,
    room: int | None = None,
    tile: Tile | None = None,
) -> Operand:
    """See `mpoe_kernels.linear.gpu.products.Primitives`."""
    m, n, k = (
        index_map(first.axes - second.axes, dims, out, first),
        index_map(second.axes - first.axes, dims, out, second),
        index_map(first.axes & second.axes, dims, second, first),
    )
    experts = offsets.shape[0] - 1
    again = partial(merge_blocks, first, second, out, dims, offsets, shared=shared, clear=clear, room=room)
    repeat = None if shared and not clear else lambda t: again(tile=t)  # what is added must be added once
    groups, inner = (1, k.extent * experts) if shared else (experts, k.extent)
    work = Work(m.extent, n.extent, inner, groups, out.data.numel(), first.data.dtype)
    if shared and first.data.dtype == torch.float32:
        room = 0  # a split sum would spill registers on sm_80
    tile, splits = _cut("blocks", first.data, work, k.extent, out, room, repeat, tile)
    mn_tiles = work.programs((tile.m, tile.n, tile.k)) // groups
    if shared:  # no part without an expert
        splits = cdiv(experts, cdiv(experts, splits))
    found = out.data if splits == 1 else _partial(out, splits)
    start(
        blocks_kernel,
        (mn_tiles, groups * splits),
        p=first.data,
        q=second.data,
        out=found,
        offsets=offsets,
        experts=experts,
        P_EXPERT=first.outer,
        Q_EXPERT=second.outer,
        OUT_EXPERT=out.outer or out.data.numel(),
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
        SUM=shared,
        SPLITS=splits,
        CLEAR=clear or splits > 1,
        PRECISION=precision(first.data.dtype),
        **launch_options(tile),
    )
    if splits > 1:
        sum_parts(found, out.data, shared and not clear)
    return out


@dataclass(frozen=True)
class TritonLaunches:
    """See `mpoe_kernels.linear.gpu.products`: both the primitives and what surrounds them.

    Attributes:
        by_token: `slots_by_token` of the rows to sum, which a launch plan cannot sort.
    """

    by_token: tuple[Tensor, ...] = ()

    rows_times_block = staticmethod(rows_times_block)
    block_gradient = staticmethod(block_gradient)
    merge_blocks = staticmethod(merge_blocks)
    weight_of_blocks = staticmethod(weight_of_blocks)
    activation_backward = staticmethod(activation_backward)
    collect_rows = staticmethod(dispatch_backward)

    def sum_rows_by_token(self, rows: Tensor, row_index: Tensor, tokens: int) -> Tensor:
        """See `mpoe_kernels.linear.gpu.products.Launches`."""
        return sum_rows(rows, *(self.by_token or slots_by_token(row_index, tokens)))

    def compute(self, whole: Pass) -> None:
        """Product after product."""
        walk(whole, self)

    def empty(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Memory from PyTorch."""
        return like.new_empty(rows, columns)

    def begin_sum(self, block: Tensor, grows: bool) -> Tensor:
        """The first product writes, the others add."""
        return torch.empty(block.shape, dtype=torch.float32 if grows else block.dtype, device=block.device)

    def end_sum(self, total: Tensor, dtype: torch.dtype) -> Tensor:
        return total if total.dtype == dtype else sum_parts(total.unsqueeze(0), torch.empty_like(total, dtype=dtype))


LAUNCHES = TritonLaunches()
