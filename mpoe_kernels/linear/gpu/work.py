"""What a launch of GEMMs takes on a GPU, and how it is cut where its tiles are fewer than the card's multiprocessors.

A program owns a tile of the result and walks along the inner size. Three things bound it: the rate of the tensor cores,
shared memory, through which both operands pass (the smaller the tile, the more often), and the cache. Where tiles are
few, they are cut smaller, or split along the inner size too: every part then gives a partial result in float32, and a
second launch adds them in a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

import torch

from mpoe_kernels.planner import Hardware

TileSize = tuple[int, int, int]  # rows, columns, inner size of a step

MOST_SPLITS = 32
LEAST_STEPS = 4  # of the inner loop that a program must have left, so that it has something to prefetch
# A multiprocessor draws so much more than its part of the cache's bandwidth where others are idle: 64 bytes a clock.
ALONE = 2.0
# What takes a launch more must take less than this part of the time: the model is rough, and the host pays too.
WORTH = 0.75
GROUP_ROWS = 64  # of a matrix instruction that reads its operands from shared memory


def shared_traffic(m: int, n: int, matrix_unit: str) -> float:
    """Elements that pass through shared memory for each step along the inner size of a tile.

    Both operands are written once. A warp's instruction reads the rows and columns of that warp, a warpgroup's 64 rows
    and all columns, a multiprocessor's the tile.
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
    """FLOP/s of the whole card by such tiles: what large GEMMs reach, or what shared memory allows if that is less.

    ``matrix_unit``: what the kernel's matrix instruction belongs to, by default the best that the card has.
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
        batch: how many.
        elements: of all results.
        dtype: of what is multiplied.
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
        """Without a split."""
        return self.batch * ceil(self.m / tile[0]) * ceil(self.n / tile[1])

    def seconds(self, tile: TileSize, splits: int, hardware: Hardware) -> float:
        """Predicted time, the sum of partial results included, without the launch."""
        return self.computing(tile, splits, hardware) + self._sum(splits, hardware)

    def computing(self, tile: TileSize, splits: int, hardware: Hardware) -> float:
        """Of the launch that multiplies.

        Arithmetic and reading hide each other. Whoever computes the last wave decides about the former, the cache and
        what one multiprocessor can draw from it about the latter.
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
        """Of writing partial results, reading them, and the launch that does the latter, which waits for all parts."""
        if splits == 1:
            return 0.0
        return 2 * hardware.launch_seconds + 2 * splits * self.elements * 4 / hardware.cache_bandwidth

    def best_splits(self, tile: TileSize, hardware: Hardware, most: int | None = None) -> int:
        """The number of parts that is worth it; 1 where the tiles fill the card.

        ``most``: parts whose results there is memory for.
        """
        if self.programs(tile) >= hardware.units:
            return 1
        limit = min(self.inner / (LEAST_STEPS * tile[2]), MOST_SPLITS if most is None else most)
        able = [1 << bit for bit in range(1, MOST_SPLITS.bit_length()) if 1 << bit <= limit]
        best = min(able, key=lambda splits: self.seconds(tile, splits, hardware), default=1)
        return best if self.seconds(tile, best, hardware) < WORTH * self.seconds(tile, 1, hardware) else 1

    def best_tile(self, tiles: Iterable[TileSize], hardware: Hardware, most: int | None = None) -> TileSize:
        """The first tile where it fills the card, else the one that is predicted to be fastest, split or not."""
        first, *others = tiles
        if self.programs(first) >= hardware.units:
            return first

        def seconds(tile: TileSize) -> float:
            splits = self.best_splits(tile, hardware, most)
            return self.seconds(tile, splits, hardware) / (1.0 if splits == 1 else WORTH)

        return min((first, *others), key=seconds)


def weight_work(m: int, cells: int, k: int, s: int, n: int, experts: int, columns: int, dtype: torch.dtype) -> Work:
    """A launch that builds halves and weights: each program ``columns`` of a tile's rows after the other.

    Args:
        m, cells, k, s, n: as in `mpoe_kernels.linear.triton.weights`.
        experts: how many.
        columns: of a tile.
        dtype: of the blocks.
    """
    inner = ceil(s / columns) * k + ceil(n / columns) * s
    return Work(m, columns, inner, cells * experts, experts * cells * m * (s + n), dtype)


def fitted_tile(tile: TileSize, work: Work) -> TileSize:
    """Without what a smaller problem would leave empty; 16 is the least that a tensor core takes."""
    sizes = zip(tile, (work.m, work.n, work.inner), strict=True)
    m, n, k = (min(most, max(16, 1 << max(ceil(size) - 1, 0).bit_length())) for most, size in sizes)
    return m, n, k
