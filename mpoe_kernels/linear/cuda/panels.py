"""Panels of the weight-stationary CUDA kernel: how wide they are, and how long the kernel takes with them.

A block of csrc/cuda/linear/panel.cuh rebuilds some columns of one expert's weight in shared memory, then streams the
expert's rows past them. With wide panels the rows are read less often; the maximum width depends on the shapes and on
the device.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.triton.hardware import Hardware

# Four warps on a multiprocessor instead of eight keep its tensor cores busy for about half of the time.
NARROW_RATE = 0.5
# Part of every multiprocessor's shared memory that the driver reserves.
RESERVED_BYTES = 1024


class _Tiles(NamedTuple):
    """The tiles of csrc/cuda/linear/panel_launch.cuh.

    Attributes:
        rows, columns: size of a block's result.
        rebuild_rows, rebuild_columns: tiles of the two products of a rebuild.
        granule: rows of the half-built weight are a multiple of this.
    """

    rows: int
    columns: int
    rebuild_rows: int
    rebuild_columns: int
    granule: int


_NARROW, _WIDE = _Tiles(64, 64, 64, 64, 32), _Tiles(128, 128, 64, 64, 16)
_STAGES, _STEP_BYTES = 3, 64


class Panel(NamedTuple):
    """The panel of a block: numbers of indices of left, centre and right on the side of the result.

    Attributes:
        left, centre, right: divisors of jL, jC, jR (of iL, iC, iR if the weight is transposed).
        left_first: left is multiplied by central before right is.
        shared_bytes: shared memory of a block.
        seconds: predicted time of the product.
    """

    left: int
    centre: int
    right: int
    left_first: bool
    shared_bytes: int
    seconds: float

    @property
    def sizes(self) -> tuple[int, int, int]:
        """left, centre, right."""
        return self[:3]


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def padded_stride(width: int, itemsize: int, k_major: bool) -> int:
    """Elements from one row of a tile in shared memory to the next, as in csrc/cuda/tile.cuh."""
    chunks = -(-width * itemsize // 16)
    if itemsize == 2 or k_major:
        chunks |= 1
    else:
        chunks += (2 - chunks) % 4
    return chunks * 16 // itemsize


def _stage_elements(tiles: _Tiles, itemsize: int) -> int:
    step = _STEP_BYTES // itemsize

    def staged(extent: int) -> int:
        return max(padded_stride(step, itemsize, True) * extent, padded_stride(extent, itemsize, False) * step)

    rows = padded_stride(step, itemsize, True) * tiles.rows
    return _STAGES * max(staged(tiles.rebuild_rows) + staged(tiles.rebuild_columns), rows)


class _Sizes(NamedTuple):
    """Sizes of the kernel's products for one panel."""

    tiles: _Tiles
    units: int  # pairs of central indices
    p: int
    q: int
    inner_first: int
    inner_second: int
    depth: int
    width: int
    panels: int


def _sizes(dims: BlockDims, kept: tuple[int, int, int], left_first: bool, transposed: bool, itemsize: int) -> _Sizes:
    i, j = (dims.iL, dims.iC, dims.iR), (dims.jL, dims.jC, dims.jR)
    summed, result = (j, i) if transposed else (i, j)
    left, right = summed[0] * kept[0], summed[2] * kept[2]
    width = math.prod(kept)
    return _Sizes(
        tiles=_WIDE if itemsize == 2 and width > _NARROW.columns else _NARROW,
        units=summed[1] * kept[1],
        p=left if left_first else right,
        q=right if left_first else left,
        inner_first=dims.a if left_first else dims.b,
        inner_second=dims.b if left_first else dims.a,
        depth=math.prod(summed),
        width=width,
        panels=math.prod(result) // width,
    )


def _shared_bytes(sizes: _Sizes, itemsize: int) -> int:
    step = _STEP_BYTES // itemsize
    panel = _round_up(sizes.depth, step) * padded_stride(sizes.width, itemsize, False)
    half = _round_up(sizes.p, sizes.tiles.granule) * padded_stride(_round_up(sizes.inner_second, step), itemsize, True)
    return (panel + half + _stage_elements(sizes.tiles, itemsize)) * itemsize


def panel_bytes(dims: BlockDims, kept: tuple[int, int, int], left_first: bool, transposed: bool, itemsize: int) -> int:
    """Shared memory of a block."""
    return _shared_bytes(_sizes(dims, kept, left_first, transposed, itemsize), itemsize)


def _seconds(sizes: _Sizes, itemsize: int, busy: int, slots: int, flops_per_second: float, hardware: Hardware) -> float:
    """Time of rebuilding and multiplying, with one block per multiprocessor, wave after wave of blocks."""
    tiles = sizes.tiles
    p, q = _round_up(sizes.p, tiles.granule), _round_up(sizes.q, 32)
    inner_second = _round_up(sizes.inner_second, 32)
    strips = -(-sizes.p // tiles.rebuild_rows)
    flops: float = 2 * sizes.units * p * (sizes.inner_first * inner_second + sizes.inner_second * q)
    traffic: float = strips * sizes.units * sizes.inner_second * (sizes.inner_first + sizes.q)
    rows = slots / max(1, busy)
    flops += 2 * _round_up(math.ceil(rows), tiles.rows // 2) * sizes.depth * _round_up(sizes.width, 16)
    traffic += rows * (sizes.depth + sizes.width)
    rate = flops_per_second / hardware.units * (NARROW_RATE if tiles is _NARROW else 1.0)
    block = max(flops / rate, traffic * itemsize * hardware.units / hardware.cache_bandwidth)
    return math.ceil(sizes.panels * busy / hardware.units) * block + hardware.launch_seconds


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@lru_cache(maxsize=4096)
def best_panel(
    dims: BlockDims,
    transposed: bool,
    itemsize: int,
    busy: int,
    slots: int,
    flops_per_second: float,
    hardware: Hardware,
) -> Panel | None:
    """The fastest panel that fits in a multiprocessor's shared memory; None if none does.

    Args:
        dims: sizes of the blocks.
        transposed: whether rows are multiplied by the transposed weight (the gradient with respect to x).
        itemsize: bytes of an element.
        busy: number of experts that have rows.
        slots: rows of all experts.
        flops_per_second: rate of the device in this dtype.
        hardware: the device.
    """
    limit = hardware.sram_bytes - RESERVED_BYTES
    result = (dims.iL, dims.iC, dims.iR) if transposed else (dims.jL, dims.jC, dims.jR)
    best: Panel | None = None
    left, centre, right = map(_divisors, result)
    for kept, left_first in product(product(left, centre, right), (True, False)):
        sizes = _sizes(dims, kept, left_first, transposed, itemsize)
        if sizes.width > sizes.tiles.columns:
            continue
        needed = _shared_bytes(sizes, itemsize)
        if needed > limit:
            continue
        seconds = _seconds(sizes, itemsize, busy, slots, flops_per_second, hardware)
        if best is None or seconds < best.seconds:
            best = Panel(*kept, left_first, needed, seconds)
    return best
