"""Few rows in one launch: what a block of csrc/cuda/linear/few.cuh computes, and how long the kernel takes.

Every block contracts its rows with left, a part of the central core and a part of right. Shared intermediates are
recomputed by every block, so this pays for few rows and small bonds, where launches and the bytes of the cores
dominate.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.cuda.panels import RESERVED_BYTES
from mpoe_kernels.triton.hardware import Hardware

# Constants of csrc/cuda/linear/few.cuh.
THREADS, ROWS_AT_ONCE = 128, 8
MOST_ROWS = 16
# Fraction of the vector units' peak that four warps of dependent sums reach.
RATE = 0.25
# Minimum time of one product's loads, sums and barriers.
PRODUCT_SECONDS = 1e-6


class Few(NamedTuple):
    """The work of a block.

    Attributes: left, centre, right: numbers of indices jL, jC, jR; each divides its axis. rows: rows of a block.
        shared_bytes: shared memory of a block. seconds: predicted time of the product.
    """

    left: int
    centre: int
    right: int
    rows: int
    shared_bytes: int
    seconds: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """left, centre, right, rows."""
        return self[:4]


def few_bytes(dims: BlockDims, left: int, centre: int, rows: int, itemsize: int) -> int:
    """Shared memory of a block."""
    sums = THREADS * ROWS_AT_ONCE * (16 // itemsize)
    return 4 * (THREADS + sums + rows * left * dims.iR * (dims.a * dims.iC + dims.b * centre))


def _seconds(dims: BlockDims, kept: tuple[int, int, int], rows: int, slots: int, itemsize: int, gpu: Hardware) -> float:
    left, centre, right = kept
    d = dims
    blocks = (d.jL // left) * (d.jC // centre) * (d.jR // right) * -(-slots // rows)
    first = rows * left * d.a * d.iL * d.iC * d.iR
    middle = -(-rows * left * d.iR // ROWS_AT_ONCE) * ROWS_AT_ONCE * d.a * d.iC * centre * d.b
    last = rows * left * centre * d.b * d.iR * right
    rate = RATE * gpu.peak_flops.float32 / gpu.units
    loads = rows * (d.iL * left * d.a + d.b * d.iR * right) + d.a * d.iC * centre * d.b
    traffic = loads * itemsize * gpu.units / gpu.cache_bandwidth
    block = max(2 * (first + middle + last) / rate, traffic) + (2 * rows + 1) * PRODUCT_SECONDS
    waves = -(-blocks // gpu.units)
    return waves * block + gpu.launch_seconds


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@lru_cache(maxsize=4096)
def best_few(dims: BlockDims, itemsize: int, slots: int, hardware: Hardware) -> Few | None:
    """The fastest division into blocks; None for more than `MOST_ROWS` rows, or if no block fits in shared memory."""
    if not 0 < slots <= MOST_ROWS:
        return None
    limit = hardware.sram_bytes - RESERVED_BYTES
    best: Few | None = None
    for rows, *kept in product((1, 2, 4, 8, 16), *map(_divisors, (dims.jL, dims.jC, dims.jR))):
        needed = few_bytes(dims, kept[0], kept[1], rows, itemsize)
        if needed > limit or rows >= 2 * slots:
            continue
        left, centre, right = kept
        seconds = _seconds(dims, (left, centre, right), rows, slots, itemsize, hardware)
        if best is None or seconds < best.seconds:
            best = Few(left, centre, right, rows, needed, seconds)
    return best
