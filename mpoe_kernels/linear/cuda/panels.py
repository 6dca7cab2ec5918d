"""Panels and tiles of the CUDA kernels whose weights and gradients stay on chip: the largest that fit.

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


class _Tiles(NamedTuple):
    """The tiles of csrc/cuda/linear/launch.cuh.

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
    """

    left: int
    centre: int
    right: int
    left_first: bool
    shared_bytes: int

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


def _rebuild_flops(sizes: _Sizes) -> int:
    """FLOPs of all panels' rebuilds."""
    return 2 * sizes.panels * sizes.units * sizes.p * sizes.inner_second * (sizes.inner_first + sizes.q)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@lru_cache(maxsize=4096)
def best_panel(dims: BlockDims, transposed: bool, itemsize: int, shared_memory: int) -> Panel | None:
    """The widest panel that fits in shared memory, of these the one that is rebuilt most cheaply; None if none fits.

    Args:
        dims: sizes of the blocks.
        transposed: whether rows are multiplied by the transposed weight (the gradient with respect to x).
        itemsize: bytes of an element.
        shared_memory: bytes that a block may use.
    """
    result = (dims.iL, dims.iC, dims.iR) if transposed else (dims.jL, dims.jC, dims.jR)
    best: tuple[tuple[int, int], Panel] | None = None
    left, centre, right = map(_divisors, result)
    for kept, left_first in product(product(left, centre, right), (True, False)):
        sizes = _sizes(dims, kept, left_first, transposed, itemsize)
        needed = _shared_bytes(sizes, itemsize)
        if sizes.width > sizes.tiles.columns or needed > shared_memory:
            continue
        key = (sizes.width, -_rebuild_flops(sizes))
        if best is None or key > best[0]:
            best = key, Panel(*kept, left_first, needed)
    return None if best is None else best[1]


LARGEST_TILE = 64  # rows and columns of the gradient kernel's tiles


@lru_cache(maxsize=4096)
def gradient_tile(dims: BlockDims) -> tuple[int, int, int, int]:
    """Indices of iL, jL, iR and jR in a tile of csrc/cuda/linear/gradient.cuh: the largest tile, of these the one with
    the longest pieces of rows."""
    best = (1, 1, 1, 1)
    left, right = (_divisors(dims.iL), _divisors(dims.jL)), (_divisors(dims.iR), _divisors(dims.jR))
    for iL, jL, iR, jR in product(*left, *right):
        fits = max(iL * iR, jL * jR, iL * jL, iR * jR) <= LARGEST_TILE
        if fits and (iL * jL * iR * jR, min(iR, jR), iR) > (math.prod(best), min(best[2:]), best[2]):
            best = iL, jL, iR, jR
    return best
