"""Tile sizes of the grouped products by architecture, as data, and the choice among them.

The choice depends on sizes and the card only: it needs no benchmark, never changes between runs and may be captured in
a graph. Every entry is compiled ahead of time for its architecture by ``tools/triton_compile.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import INTERPRETER


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


# The widest problem's first; the same for both kernels, ``rows`` and ``blocks``.
_NVIDIA = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3))
_AMD = tuple(tile._replace(k=32, stages=2) for tile in _NVIDIA)
TILES = {"sm_80": _NVIDIA, "sm_90": _NVIDIA, "sm_100": _NVIDIA, "gfx942": _AMD}
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
TILES[INTERPRETER] = (Tile(64, 64, 64, 4, 1),)


def _for_float32(tile: Tile) -> Tile:
    """A smaller tile: without tensor cores a thread holds its rows and columns of all k in registers."""
    warps = 8 if tile.m >= 64 else tile.warps  # wide ones spill if there are few registers per thread
    return Tile(min(tile.m, 64), min(tile.n, 64), 16, warps, tile.stages)


def shipped_tiles(name: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles on an architecture, the widest first."""
    smaller = dtype == torch.float32 and name != INTERPRETER
    return tuple(map(_for_float32, TILES[name])) if smaller else TILES[name]


def least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    """Shared memory in which the smallest tile fits."""
    return min(tile.shared_bytes(dtype) for tile in shipped_tiles(name, dtype))


def tile_of(like: Tensor, m: float, n: float, k: float) -> Tile:
    """Tile of an ``m x n x k`` GEMM on the device of ``like``: the widest that its rows fill and that fits into shared
    memory, and no larger than the problem."""
    target = architecture.target_of(like.device)
    shipped = shipped_tiles(target.architecture, like.dtype)
    able = [tile for tile in shipped if tile.shared_bytes(like.dtype) <= target.shared_memory] or shipped[-1:]
    found = next((tile for tile in able if tile.m <= m), able[-1])
    return found._replace(m=min(found.m, _side(m)), n=min(found.n, _side(n)), k=min(found.k, _side(k)))


def _side(size: float) -> int:
    """Power of two that covers a size, at least 16, the least that a tensor core takes."""
    return max(16, 1 << max(int(-(-size // 1)) - 1, 0).bit_length())
