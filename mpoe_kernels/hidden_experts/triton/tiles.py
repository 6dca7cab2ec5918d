"""Tiles of the kernels of `hidden_experts`, as data, and the choice among them. Nothing here imports Triton.

Every entry is compiled ahead of time for its architecture by ``tools/triton_compile.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from mpoe_kernels.triton.architecture import INTERPRETER

# Costs in equivalent FLOPs of a tensor-core product: an activation, reading an element of a block.
ACTIVATION_FLOPS, LOAD_FLOPS = 40, 64


class Tile(NamedTuple):
    """Block sizes and warps of a kernel.

    Attributes:
        tokens: tokens of a program.
        rows: rows that an expert computes at once. Equal to ``tokens``: all of them, with gates of 0 where another
            expert was chosen. Fewer: an expert's own rows are gathered first.
        units: units of a group that a program computes.
        inner: units that a product sums over at once; also the step of the units between two products.
        warps: of a program.
        registers: limit per thread for NVIDIA's compiler; 0: the compiler decides.
    """

    tokens: int
    rows: int
    units: int
    inner: int
    warps: int
    registers: int = 0

    @property
    def collects(self) -> bool:
        """Whether experts collect their rows."""
        return self.rows < self.tokens


# kernel -> bytes of an element -> tiles
_NVIDIA: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        2: (Tile(64, 64, 64, 64, 4), Tile(16, 16, 64, 64, 4), Tile(128, 16, 64, 32, 4), Tile(256, 16, 64, 32, 8)),
        4: (Tile(64, 64, 64, 16, 8),),
    },
    "rows": {
        2: (Tile(32, 32, 64, 64, 4), Tile(16, 16, 64, 64, 4), Tile(128, 16, 64, 32, 8)),
        4: (Tile(64, 16, 64, 16, 8),),
    },
    "blocks": {2: (Tile(32, 32, 64, 64, 8),), 4: (Tile(16, 16, 32, 16, 8),)},
}
_AMPERE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {2: _NVIDIA["forward"][2], 4: (Tile(64, 64, 64, 16, 8), Tile(64, 16, 64, 16, 8))},
    "rows": {
        2: (Tile(32, 32, 64, 64, 4), Tile(16, 16, 64, 32, 4), Tile(128, 16, 64, 32, 8)),
        4: (Tile(64, 16, 32, 16, 8),),
    },
    "blocks": {2: (Tile(32, 32, 32, 64, 4),), 4: (Tile(16, 16, 32, 16, 8),)},
}
# Warps of 64 threads: with 8 of them a thread has half as many registers.
_AMD: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        2: (Tile(64, 64, 64, 64, 4), Tile(16, 16, 64, 64, 4), Tile(128, 16, 64, 64, 4)),
        4: (Tile(64, 16, 64, 16, 4),),
    },
    "rows": {
        2: (Tile(16, 16, 64, 64, 4), Tile(64, 16, 64, 64, 4)),
        4: (Tile(64, 16, 64, 16, 4),),
    },
    "blocks": {2: (Tile(16, 16, 64, 64, 4),), 4: (Tile(16, 16, 32, 16, 4),)},
}
_FEW_ROWS: tuple[Tile, ...] = (Tile(64, 64, 64, 64, 4), Tile(16, 16, 64, 64, 4), Tile(64, 16, 64, 64, 4))
_INTERPRETED: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": dict.fromkeys((2, 4), _FEW_ROWS),
    "rows": dict.fromkeys((2, 4), _FEW_ROWS),
    "blocks": dict.fromkeys((2, 4), (Tile(32, 32, 64, 64, 4),)),
}
# For blocks of more than 64 units: more warps, where a thread could not hold what it recomputes for every part.
_HOPPER_LARGE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        2: (Tile(64, 64, 64, 64, 8), Tile(16, 16, 64, 64, 4, 255), Tile(128, 16, 64, 32, 8)),
        4: _NVIDIA["forward"][4],
    },
    "rows": {
        2: (Tile(32, 32, 64, 64, 8), Tile(16, 16, 32, 32, 4), Tile(64, 16, 64, 32, 8, 255)),
        4: (Tile(64, 16, 32, 16, 8),),
    },
    "blocks": {2: (Tile(32, 32, 32, 64, 8),), 4: (Tile(16, 16, 16, 16, 8),)},
}
_BLACKWELL_LARGE: dict[str, dict[int, tuple[Tile, ...]]] = {
    **_HOPPER_LARGE,
    "forward": {
        2: (Tile(64, 64, 64, 64, 8), Tile(16, 16, 64, 64, 4, 255), Tile(128, 16, 64, 32, 8, 255)),
        4: _NVIDIA["forward"][4],
    },
    "rows": {
        2: (Tile(32, 32, 64, 64, 8), Tile(16, 16, 64, 64, 4), Tile(64, 16, 64, 32, 8, 255)),
        4: _HOPPER_LARGE["rows"][4],
    },
}
_AMPERE_LARGE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "forward": {
        2: (Tile(64, 64, 64, 64, 8), Tile(16, 16, 64, 64, 4), Tile(256, 16, 64, 32, 8)),
        4: (Tile(64, 64, 32, 16, 8),),
    },
    "rows": {
        2: (Tile(32, 32, 64, 64, 8), Tile(16, 16, 64, 32, 4, 255), Tile(128, 16, 64, 32, 8)),
        4: (Tile(32, 16, 32, 16, 8),),
    },
    "blocks": {2: (Tile(32, 32, 32, 64, 4, 255),), 4: _AMPERE["blocks"][4]},
}
TILES = {"sm_80": _AMPERE, "sm_90": _NVIDIA, "sm_100": _NVIDIA, "gfx942": _AMD, INTERPRETER: _INTERPRETED}
LARGE_TILES = TILES | {"sm_80": _AMPERE_LARGE, "sm_90": _HOPPER_LARGE, "sm_100": _BLACKWELL_LARGE}
LARGEST_BLOCK = 64  # of the first table


def busy_experts(experts: int, top_k: int, tokens: int) -> float:
    """Expected number of experts chosen by ``tokens`` tokens under uniform routing."""
    return experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens)


def rows_per_token(tile: Tile, experts: int, top_k: int) -> float:
    """Rows that experts compute per token, including padding; ``top_k`` without waste."""
    busy = busy_experts(experts, top_k, tile.tokens)
    if not tile.collects:
        return busy
    share = tile.tokens * top_k / busy
    return busy * max(1.0, share / tile.rows + 0.5) * tile.rows / tile.tokens


def row_cost(tile: Tile, experts: int, top_k: int, block: int, products: int) -> float:
    """FLOPs of a hidden unit of a token: ``products``, activations, adding results back, reading blocks."""
    moving = 2 * tile.tokens if tile.collects else 0
    reading = LOAD_FLOPS * products * block * busy_experts(experts, top_k, tile.tokens) / tile.tokens
    parts = max(1, -(-block // tile.units))
    multiplying = 2 * block * (1 + parts * (products - 1))  # all products but the last are repeated for every part
    return rows_per_token(tile, experts, top_k) * (multiplying + ACTIVATION_FLOPS + moving) + reading


def shipped_tiles(kernel: str, architecture: str, dtype: torch.dtype, block: int) -> tuple[Tile, ...]:
    """Tiles of the kernel ``forward``, ``rows`` or ``blocks``; for the last, ``rows`` is the number of slots taken at
    once."""
    table = TILES if block <= LARGEST_BLOCK else LARGE_TILES
    return table[architecture][kernel][dtype.itemsize]


def compiler_options(tile: Tile) -> dict[str, int]:
    """Keyword arguments of a launch."""
    return {"num_warps": tile.warps, **({"maxnreg": tile.registers} if tile.registers else {})}


def best_row_tile(
    tiles: tuple[Tile, ...],
    units: int,
    *,
    tokens: int,
    groups: int,
    experts: int,
    top_k: int,
    block: int,
    products: int,
) -> Tile:
    """The cheapest tile on a device with ``units`` multiprocessors, including the cost of idle ones."""

    def seconds(tile: Tile) -> float:
        programs = -(-tokens // tile.tokens) * groups
        padding = -(-tokens // tile.tokens) * tile.tokens / tokens
        waiting = max(1.0, units / programs)
        return row_cost(tile, experts, top_k, block, products) * padding * waiting

    return min(tiles, key=seconds)


def fitted(tile: Tile, block: int) -> dict[str, int]:
    """Units and inner sizes of a tile for blocks that may be smaller (16 is the least a tensor core takes)."""
    most = max(16, 1 << max(block - 1, 0).bit_length())
    return {"BN": min(tile.units, most), "BK": min(tile.inner, most)}
