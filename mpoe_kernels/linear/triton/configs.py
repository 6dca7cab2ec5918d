"""Tile sizes per kernel and architecture, as data, and the choice among them.

The choice depends on sizes and the card only: it needs no benchmark and never changes between runs. Every entry is
compiled ahead of time for its architecture by ``tools/triton_compile.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.linear.triton.fused_tiles import Cut, FusedTile, Sides, best_tile, fused_tiles
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import INTERPRETER

MOST_SPLITS = 32
LEAST_STEPS = 8  # inner steps of a part, so that it can prefetch and is worth the sum that follows


class Tile(NamedTuple):
    """Block sizes of a GEMM ``[m, k] x [k, n]``, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operands' blocks in all stages."""
        return self.stages * self.k * (self.m + self.n) * dtype.itemsize

    def fitted(self, m: float, n: float, k: float) -> Tile:
        """The same tile, shrunk to fit a smaller problem (16 is the minimum for a tensor core)."""
        return Tile(min(self.m, _side(m)), min(self.n, _side(n)), min(self.k, _side(k)), self.warps, self.stages)


def _side(size: float) -> int:
    """Power of two that covers a size, at least 16."""
    return max(16, 1 << max(int(-(-size // 1)) - 1, 0).bit_length())


# kernel -> architecture -> tiles, the widest problem's first; float32 takes smaller ones, see `for_float32`.
_NVIDIA: dict[str, tuple[Tile, ...]] = {
    "rows": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "outer": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "blocks": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
}
_AMD: dict[str, tuple[Tile, ...]] = {
    name: tuple(tile._replace(k=min(tile.k, 32), stages=2) for tile in tiles) for name, tiles in _NVIDIA.items()
}
TILES = {"sm_80": _NVIDIA, "sm_90": _NVIDIA, "sm_100": _NVIDIA, "gfx942": _AMD}
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
TILES[INTERPRETER] = {name: (Tile(64, 64, 64, 4, 1),) for name in _NVIDIA}


def for_float32(tile: Tile) -> Tile:
    """A smaller tile: without tensor cores a thread holds its rows and columns of all k in registers."""
    return tile._replace(
        m=min(tile.m, 64),
        n=min(tile.n, 64),
        k=max(16, tile.k // 4),
        warps=8 if tile.m >= 64 else min(tile.warps, 4),  # wide ones spill if there are few registers per thread
    )


def shipped_tiles(kernel: str, name: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles of a kernel on an architecture, the widest first."""
    tiles = TILES[name][kernel]
    smaller = dtype == torch.float32 and name != INTERPRETER
    return tuple(map(for_float32, tiles)) if smaller else tiles


def least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    """Shared memory in which every kernel's smallest tile fits."""
    return max(min(tile.shared_bytes(dtype) for tile in shipped_tiles(kernel, name, dtype)) for kernel in TILES[name])


def tiles_for(kernel: str, like: Tensor, m: float, n: float, k: float) -> Iterator[Tile]:
    """Tiles of a kernel for an ``m x n x k`` GEMM on the device of ``like``: the widest that its rows fill and that
    fits into shared memory, then the smaller ones."""
    target = architecture.target_of(like.device)
    shipped = shipped_tiles(kernel, target.architecture, like.dtype)
    able = tuple(t for t in shipped if t.shared_bytes(like.dtype) <= target.shared_memory) or shipped[-1:]
    suitable = tuple(tile for tile in able if tile.m <= m) or able[-1:]
    return (tile.fitted(m, n, k) for tile in suitable)


def tile_and_splits(
    kernel: str, like: Tensor, m: int, n: int, k: float, batch: int, most: int = MOST_SPLITS
) -> tuple[Tile, int]:
    """Tile of a kernel that computes ``batch`` GEMMs and can split their inner size, and the number of parts.

    The first tile whose programs occupy half of the card or more; with too few of them the inner size is split.

    Args:
        kernel, like, m, n, k: as for `tiles_for`.
        batch: number of GEMMs.
        most: number of parts that memory allows.
    """
    units = architecture.target_of(like.device).multiprocessors
    for tile in tiles_for(kernel, like, m, n, k):
        programs, splits = batch * -(-m // tile.m) * -(-n // tile.n), 1
        limit = min(most, MOST_SPLITS, k / (LEAST_STEPS * tile.k))
        while 2 * programs * splits <= units and 2 * splits <= limit:
            splits *= 2
        if 2 * programs * splits > units:
            break
    return tile, splits


def launch_options(tile: Tile) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def fused_choice(like: Tensor, sides: Sides, rows: float, purpose: str) -> tuple[FusedTile, Cut]:
    """Tile of a fused kernel for ``rows`` rows per expert on the device of ``like``, and its division of the weight.

    Raises:
        ValueError: no tile fits; `reasons.fused_reasons` says so beforehand.
    """
    target = architecture.target_of(like.device)
    tiles = fused_tiles(purpose, target.architecture, like.dtype)
    found = best_tile(tiles, sides, rows, like.dtype.itemsize, target.shared_memory, purpose)
    if found is None:
        raise ValueError(f"no tile of the fused kernels fits {sides} on {target.architecture}")
    return found
