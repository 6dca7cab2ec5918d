"""Launches `mpoe_kernels.linear.triton.weights`."""

from __future__ import annotations

import torch

from mpoe_kernels.linear.gpu.operands import index_map
from mpoe_kernels.linear.gpu.primitives import Sum
from mpoe_kernels.linear.gpu.work import WORTH, Work, weight_work
from mpoe_kernels.linear.triton.configs import Tile, launch_options, tile_for
from mpoe_kernels.linear.triton.weights import weights_kernel
from mpoe_kernels.triton.card import card, precision
from mpoe_kernels.triton.start import architecture_of, cdiv, device_of, start


def weight(made: Sum, whole: Sum) -> bool:
    """See `mpoe_kernels.linear.gpu.primitives.Primitives`; in two launches if those are predicted to be much faster.

    Always two on AMD: its barrier inside a program waits only for shared memory, and the half goes through the cache.
    """
    outer, core = made.centre_last()
    other, half = whole.centre_last()
    out, dims, offsets = whole.out, whole.dims, whole.offsets
    device = device_of(outer.data)
    if architecture_of(device).startswith("gfx"):
        return False
    m, k = (
        index_map(outer.axes - core.axes, dims, out, outer, half),
        index_map(outer.axes & core.axes, dims, core, outer),
    )
    cells = index_map(core.axes & out.axes, dims, out, core, half)
    s, n = (
        index_map(half.axes & other.axes, dims, core, half, other),
        index_map(other.axes - half.axes, dims, out, other),
    )
    experts, dtype, hardware = whole.experts, outer.data.dtype, card(device)
    sizes = m.extent, cells.extent, k.extent, s.extent, n.extent, experts

    def seconds(tile: Tile) -> float:
        return weight_work(*sizes, tile.n, dtype).computing((tile.m, tile.n, tile.k), 1, hardware)

    def best(tiles: tuple[Tile, ...]) -> Tile:
        return min(tiles, key=seconds)

    # Steps of 16 would spill registers on sm_100.
    columns, inner = max(s.extent, n.extent), max(k.extent, s.extent, 32)
    tile = tile_for("weights", outer.data, m.extent, columns, inner, None, best)
    separate = (
        Work(m.extent, cells.extent * s.extent, k.extent, experts, half.data.numel(), dtype),
        Work(m.extent * cells.extent, n.extent, s.extent, experts, half.data.numel() + out.data.numel(), dtype),
    )
    moving = [work.elements * dtype.itemsize / hardware.bandwidth for work in separate]
    computing = [work.computing((tile.m, tile.n, tile.k), 1, hardware) for work in separate]
    alone = sum(map(max, computing, moving)) + hardware.launch_seconds
    if hardware.units > 1 and alone < WORTH * max(seconds(tile), moving[1]):
        return False
    options = launch_options(tile)
    if architecture_of(device) == "sm_80" and dtype == torch.float32 and tile.warps == 8:
        options["maxnreg"] = 128  # the same limit as by default, but with it set explicitly the compiler spills nothing
    start(
        weights_kernel,
        (cdiv(m.extent, tile.m) * cells.extent, experts),
        p=outer.data,
        core=core.data,
        half=half.data,
        q=other.data,
        out=out.data,
        offsets=offsets,
        P_EXPERT=outer.outer,
        HALF_EXPERT=half.outer,
        Q_EXPERT=other.outer,
        OUT_EXPERT=out.outer,
        M=m.extent,
        K=k.extent,
        S=s.extent,
        N=n.extent,
        CELLS=cells.extent,
        M_SIZES=m.sizes,
        M_OUT=m.strides[0],
        M_P=m.strides[1],
        M_HALF=m.strides[2],
        K_SIZES=k.sizes,
        K_CORE=k.strides[0],
        K_P=k.strides[1],
        S_SIZES=s.sizes,
        S_CORE=s.strides[0],
        S_HALF=s.strides[1],
        S_Q=s.strides[2],
        N_SIZES=n.sizes,
        N_OUT=n.strides[0],
        N_Q=n.strides[1],
        CELL_SIZES=cells.sizes,
        CELL_OUT=cells.strides[0],
        CELL_CORE=cells.strides[1],
        CELL_HALF=cells.strides[2],
        PRECISION=precision(outer.data.dtype),
        **options,
    )
    return True
