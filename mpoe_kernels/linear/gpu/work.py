"""Predicted time of a launch of GEMMs on a GPU, and its tiling if there are fewer tiles than multiprocessors.

A program computes a tile of the result and loops along the inner size. Three things bound it: the rate of the tensor
cores, shared memory, through which both operands pass (the smaller the tile, the more often), and the cache. If there
are few tiles, smaller ones are used, or the inner size is split: every part then writes a partial result in float32,
and a second launch adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import torch

from mpoe_kernels.triton.hardware import Hardware

TileSize = tuple[int, int, int]  # rows, columns, inner size of a step

MOST_SPLITS = 32
LEAST_STEPS = 4  # minimum number of inner steps per program, so that it can prefetch
# Factor by which a multiprocessor can exceed its share of the cache bandwidth if others are idle: 64 bytes per clock.
ALONE = 2.0
# A variant with an additional launch must take less than this fraction of the time: the model is rough, and the host
# pays too.
WORTH = 0.75
GROUP_ROWS = 64  # rows of a matrix instruction that reads its operands from shared memory


def shared_traffic(m: int, n: int, matrix_unit: str) -> float:
    """Elements that pass through shared memory for each step along the inner size of a tile.

    Both operands are written once. A warp's instruction reads the rows and columns of that warp, a warpgroup's reads 64
    rows and all columns, a multiprocessor's reads the tile.
    """
    if matrix_unit == "multiprocessor" and m >= GROUP_ROWS:
        return 2 * (m + n)
    if matrix_unit == "warpgroup" and m >= GROUP_ROWS:
        return m + n + m + n * m / GROUP_ROWS
    warps = 8 if m * n >= 128 * 128 else 4
    shapes = [(m // rows, n * rows // warps) for rows in (1, 2, 4, 8) if rows <= warps]
    least = [m * n * (1 / rows + 1 / columns) for rows, columns in shapes if rows >= 16 and columns >= 8]
    return m + n + min(least, default=m * n * (1 / 16 + 1 / 8))


def rate(tile: TileSize, dtype: torch.dtype, hardware: Hardware, matrix_unit: str | None = None) -> float:
    """FLOP/s of the whole card with these tiles: the rate of large GEMMs, or the limit of shared memory if that is
    lower.

    ``matrix_unit``: unit of the kernel's matrix instruction, by default the card's best.
    """
    m, n, _ = tile
    reached = hardware.flops_per_second(dtype)
    if not hardware.sram_bandwidth or dtype.itemsize > 2:
        return reached
    traffic = shared_traffic(m, n, matrix_unit or hardware.matrix_unit) * dtype.itemsize
    return min(reached, 2 * m * n * hardware.sram_bandwidth / traffic)


class Work(NamedTuple):
    """GEMMs of one size that a launch computes.

    Attributes:
        m, n: rows and columns of one.
        inner: its inner size, the mean over experts.
        batch: number of GEMMs.
        elements: size of all results.
        dtype: dtype of the factors.
        matrix_unit: see `rate`.
    """

    m: int
    n: int
    inner: float
    batch: int
    elements: int
    dtype: torch.dtype
    matrix_unit: str | None = None

    def programs(self, tile: TileSize) -> int:
        """Number of programs without a split."""
        return self.batch * ceil(self.m / tile[0]) * ceil(self.n / tile[1])

    def seconds(self, tile: TileSize, splits: int, hardware: Hardware) -> float:
        """Predicted time, including the sum of partial results, without launch overhead."""
        return self.computing(tile, splits, hardware) + self._sum(splits, hardware)

    def computing(self, tile: TileSize, splits: int, hardware: Hardware) -> float:
        """Time of the launch that multiplies.

        Arithmetic and reads overlap. The last wave determines the former; the cache, and the bandwidth that one
        multiprocessor can draw from it, determine the latter.
        """
        m, n, k = tile
        programs = self.programs(tile) * splits
        part = ceil(self.inner / (k * splits)) * k
        waves = ceil(programs / hardware.units)
        flops = waves * hardware.units * 2 * m * n * part
        arithmetic = flops / rate(tile, self.dtype, hardware, self.matrix_unit)
        read = (m + n) * part * self.dtype.itemsize / hardware.cache_bandwidth
        return max(arithmetic, read * max(programs, waves * hardware.units / ALONE))

    def _sum(self, splits: int, hardware: Hardware) -> float:
        """Time of writing and reading partial results, and of the second launch, which waits for all parts."""
        if splits == 1:
            return 0.0
        return 2 * hardware.launch_seconds + 2 * splits * self.elements * 4 / hardware.cache_bandwidth

    def best_splits(self, tile: TileSize, hardware: Hardware, most: int | None = None) -> int:
        """The best number of parts; 1 if the tiles fill the card.

        ``most``: maximum number of parts that memory allows.
        """
        if self.programs(tile) >= hardware.units:
            return 1
        limit = min(self.inner / (LEAST_STEPS * tile[2]), MOST_SPLITS if most is None else most)
        able = [1 << bit for bit in range(1, MOST_SPLITS.bit_length()) if 1 << bit <= limit]
        best = min(able, key=lambda splits: self.seconds(tile, splits, hardware), default=1)
        return best if self.seconds(tile, best, hardware) < WORTH * self.seconds(tile, 1, hardware) else 1

    def best_tile(self, tiles: Iterable[TileSize], hardware: Hardware, most: int | None = None) -> TileSize:
        """The first tile if it fills the card, else the one that is predicted to be fastest, split or not."""
        first, *others = tiles
        if self.programs(first) >= hardware.units:
            return first

        def seconds(tile: TileSize) -> float:
            splits = self.best_splits(tile, hardware, most)
            return self.seconds(tile, splits, hardware) / (1.0 if splits == 1 else WORTH)

        return min((first, *others), key=seconds)


def weight_work(m: int, cells: int, k: int, s: int, n: int, experts: int, columns: int, dtype: torch.dtype) -> Work:
    """The work of a launch that builds halves and weights: each program computes a tile's rows, ``columns`` at a time.

    Args:
        m, cells, k, s, n: as in `mpoe_kernels.linear.triton.weights`.
        experts: number of experts.
        columns: columns of a tile.
        dtype: dtype of the blocks.
    """
    inner = ceil(s / columns) * k + ceil(n / columns) * s
    return Work(m, columns, inner, cells * experts, experts * cells * m * (s + n), dtype)


def fitted_tile(tile: TileSize, work: Work) -> TileSize:
    """A tile shrunk to fit a smaller problem; 16 is the minimum for a tensor core."""
    sizes = zip(tile, (work.m, work.n, work.inner), strict=True)
    m, n, k = (min(most, max(16, 1 << max(ceil(size) - 1, 0).bit_length())) for most, size in sizes)
    return m, n, k
