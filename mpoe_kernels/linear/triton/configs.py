"""Tile sizes per kernel and architecture, as data, and the choice among them.

The first entry that fits a problem is the fixed choice: it needs no benchmark and never changes between runs. Every
entry is compiled ahead of time for its architecture by ``tools/triton_compile.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.linear.triton.fused_tiles import Cut, FusedTile, Sides, able_tiles, best_tile, fused_table
from mpoe_kernels.triton import tuning
from mpoe_kernels.triton.architecture import INTERPRETER, shared_memory_of
from mpoe_kernels.triton.start import architecture_of, device_of, recorded_tile, target_of


@dataclass(frozen=True)
class Tile:
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
        sizes = [
            min(tile, max(16, 1 << max(int(-(-size // 1)) - 1, 0).bit_length()))
            for tile, size in zip((self.m, self.n, self.k), (m, n, k), strict=True)
        ]
        return replace(self, m=sizes[0], n=sizes[1], k=sizes[2])


# kernel -> architecture -> tiles, the widest problem's first; float32 takes smaller ones, see `for_float32`.
_NVIDIA: dict[str, tuple[Tile, ...]] = {
    "rows": (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "outer": (Tile(128, 128, 64, 8, 3), Tile(64, 64, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3)),
    "blocks": (Tile(128, 128, 32, 8, 3), Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
    "weights": (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)),
}
_NVIDIA["pairs"] = _NVIDIA["weights"]  # columns of both products, each of which may have its own rows
_AMD: dict[str, tuple[Tile, ...]] = {
    name: tuple(replace(tile, k=min(tile.k, 32), stages=2) for tile in tiles)
    for name, tiles in _NVIDIA.items()
    if name != "weights"  # see `mpoe_kernels.linear.triton.weights_launch`
}
# For products with whole weights, which are read through descriptors: no thread holds their addresses.
_HOPPER = _NVIDIA | {"wide rows": (Tile(128, 256, 64, 8, 3), *_NVIDIA["rows"][1:])}
TILES: dict[str, dict[str, tuple[Tile, ...]]] = {"sm_80": _NVIDIA, "sm_90": _HOPPER, "sm_100": _HOPPER, "gfx942": _AMD}
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
TILES[INTERPRETER] = {name: (Tile(64, 64, 64, 4, 1),) for name in _HOPPER}


def for_float32(tile: Tile, kernel: str) -> Tile:
    """A smaller tile: without tensor cores a thread holds its rows and columns of all k in registers."""
    wide = tile.m >= 64 and kernel != "pairs"  # these spill if there are few registers per thread
    return replace(
        tile, m=min(tile.m, 64), n=min(tile.n, 64), k=max(16, tile.k // 4), warps=8 if wide else min(tile.warps, 4)
    )


def candidates(kernel: str, architecture: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Shipped tiles of a kernel, in the order of preference."""
    tiles = TILES[architecture][kernel]
    smaller = dtype == torch.float32 and architecture != INTERPRETER
    return tuple(for_float32(tile, kernel) for tile in tiles) if smaller else tiles


def most_tiles(architecture: str) -> int:
    """Length of the longest table of tiles."""
    return max(len(tiles) for tiles in TILES[architecture].values())


def _that_fit(kernel: str, architecture: str, dtype: torch.dtype, limit: int) -> tuple[Tile, ...]:
    """Tiles that fit in the shared memory of a smaller device of the architecture; the smallest one if none does."""
    tiles = candidates(kernel, architecture, dtype)
    products = 2 if kernel == "pairs" else 1
    return tuple(tile for tile in tiles if products * tile.shared_bytes(dtype) <= limit) or tiles[-1:]


@lru_cache(maxsize=16384)
def _fitted_tiles(
    kernel: str, architecture: str, dtype: torch.dtype, limit: int, m: float, n: float, k: float
) -> tuple[Tile, ...]:
    """Tiles for an ``m x n x k`` GEMM, the fixed choice first."""
    shipped = _that_fit(kernel, architecture, dtype, limit)
    fixed = next((tile for tile in shipped if tile.m <= m), shipped[-1])
    return tuple(dict.fromkeys(tile.fitted(m, n, k) for tile in (fixed, *shipped)))


def least_shared_bytes(architecture: str, dtype: torch.dtype) -> int:
    """Shared memory in which every kernel's smallest tile fits."""
    return max(
        min(tile.shared_bytes(dtype) for tile in candidates(kernel, architecture, dtype))
        for kernel in TILES[architecture]
    )


def tile_for(
    kernel: str,
    like: Tensor,
    m: float,
    n: float,
    k: float,
    launch: Callable[[Tile], object] | None = None,
    best: Callable[[tuple[Tile, ...]], Tile] | None = None,
) -> Tile:
    """Tile of a kernel for an ``m x n x k`` GEMM on the device of ``like``: the fixed choice, or a measured one.

    ``launch`` launches the kernel with a tile; without it nothing can be measured. See `tuning.autotuned`. ``best``
    makes the fixed choice among the tiles that fit; by default it is the first one.
    """
    device = device_of(like)
    architecture, limit = architecture_of(device), shared_memory_of(device)
    entry = recorded_tile()
    if entry is not None:
        shipped = _that_fit(kernel, architecture, like.dtype, limit)
        return shipped[min(entry, len(shipped) - 1)].fitted(m, n, k)
    tiles = _fitted_tiles(kernel, architecture, like.dtype, limit, m, n, k)
    if best is not None:
        tiles = tuple(dict.fromkeys((best(tiles), *tiles)))
    return tuning.choose(kernel, device, like.dtype, (m, n, k), tiles, launch)


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


def fused_choice(
    like: Tensor,
    sides: Sides,
    rows: float,
    purpose: str,
    tile: FusedTile | None = None,
    launch: Callable[[FusedTile], object] | None = None,
) -> tuple[FusedTile, Cut]:
    """Tile of a fused kernel for ``rows`` rows per expert on the device of ``like``, and its division of the weight.

    Args: tile: use this one. launch: launches the kernel with a tile, as for `tile_for`.

    Raises:
        ValueError: no tile fits; `fused_cost.fused_reasons` says so beforehand.
    """
    device = device_of(like)
    architecture, limit = target_of(device)
    itemsize = like.dtype.itemsize
    tiles = fused_table(purpose)[architecture][itemsize] if tile is None else (tile,)
    if (entry := recorded_tile()) is not None and tile is None and tiles:
        tiles = (tiles[min(entry, len(tiles) - 1)],)
    found = best_tile(tiles, sides, rows, itemsize, limit, purpose)
    if found is None:
        raise ValueError(f"no tile of the fused kernels fits {sides} on {architecture}")
    able = dict(able_tiles(tiles, sides, itemsize, limit, purpose))
    sizes = (rows, *sides.k, *sides.n, sides.a, sides.b)
    ordered = list(dict.fromkeys((found[0], *able)))
    chosen = tuning.choose(f"fused {purpose}", device, like.dtype, sizes, ordered, launch)
    return chosen, able[chosen]
