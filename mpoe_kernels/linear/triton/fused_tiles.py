"""Tiles of the fused kernels, as data, and how a tile divides a weight. Plain Python, without
Triton.

A tile of W is a product of ``rows`` (digits of iL and jL) and ``columns`` (digits of iR and jR) for
one value of iC and jC. The choice of digits determines how much of W is padding, how wide the
product with the tokens' rows is, and what a program keeps in registers and shared memory; `cut`
takes the cheapest choice that fits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import INTERPRETER, Target

MOST_BOND = 64  # larger bonds do not fit on chip next to the tokens
LEAST = 16  # side of a tensor core's operand
WIDEST = 128
READING = 32  # multiply-adds in the time that one element takes from the cache
STEP = 1 << 17  # and in the time that the parts of a step wait for one another


@dataclass(frozen=True)
class FusedTile:
    """Limits of a fused kernel's tile.

    Attributes:
        m: rows of tokens, at once; a gradient sums over them.
        rows, columns: of the product that makes a tile of W.
        accumulators: float32 numbers that a program keeps in registers.
        warps, stages: of a program.
    """

    m: int
    rows: int
    columns: int
    accumulators: int
    warps: int
    stages: int


Table = dict[str, tuple[FusedTile, ...]]  # architecture -> tiles for elements of two bytes

_ROWS_HOPPER = tuple(FusedTile(m, 64, 128, 16384, 4, 2) for m in (128, 64, 32, 16))
_ROWS_BLACKWELL = (FusedTile(128, 64, 128, 12288, 4, 2), *_ROWS_HOPPER[1:])
_ROWS_AMPERE = (
    FusedTile(64, 64, 64, 12288, 8, 2),
    FusedTile(32, 64, 64, 12288, 4, 2),
    FusedTile(16, 64, 64, 12288, 4, 2),
)
_ROWS_CDNA = tuple(FusedTile(m, 64, 64, 12288, 4, 1) for m in (64, 32, 16))
ROWS_TILES: Table = {
    "sm_80": _ROWS_AMPERE,
    "sm_90": _ROWS_HOPPER,
    "sm_100": _ROWS_BLACKWELL,
    "gfx942": _ROWS_CDNA,
}
GRADIENT_TILES: Table = {
    "sm_80": (FusedTile(32, 64, 64, 12288, 4, 3),),
    "sm_90": (FusedTile(64, 64, 128, 20480, 4, 3),),
    "sm_100": (FusedTile(32, 64, 128, 20480, 4, 3),),
    "gfx942": (FusedTile(32, 64, 64, 12288, 4, 1),),
}
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
for _table in (ROWS_TILES, GRADIENT_TILES):
    _table[INTERPRETER] = (FusedTile(32, 128, 128, 1 << 20, 4, 1),)


def shipped_fused(purpose: str, name: str, dtype: torch.dtype) -> tuple[FusedTile, ...]:
    """Tiles for rows times W (``"rows"``) or the blocks' gradients (``"gradient"``) on an
    architecture."""
    if dtype == torch.float32 and name != INTERPRETER:
        # Without tensor cores every tile took too many registers, so weights are rebuilt step by
        # step.
        return ()
    if purpose == "gradient":
        return GRADIENT_TILES[name]
    return ROWS_TILES[name]


class Sides(NamedTuple):
    """Sizes of the left, central and right digits of what a product sums (k) and leaves (n), and
    the bonds."""

    k: tuple[int, int, int]
    n: tuple[int, int, int]
    a: int
    b: int

    @classmethod
    def of(cls, dims: BlockDims, transposed: bool = False) -> Sides:
        """Of ``x W``, or of ``dy W^T`` if ``transposed``."""
        i = (dims.iL, dims.iC, dims.iR)
        j = (dims.jL, dims.jC, dims.jR)
        if transposed:
            return cls(j, i, dims.a, dims.b)
        return cls(i, j, dims.a, dims.b)


class Cut(NamedTuple):
    """Extents of a tile's digits: the left and right ones of k and n. The central ones are 1."""

    kl: int
    nl: int
    kr: int
    nr: int

    @property
    def k(self) -> int:
        return self.kl * self.kr

    @property
    def n(self) -> int:
        return self.nl * self.nr

    @property
    def rows(self) -> int:
        return self.kl * self.nl

    @property
    def columns(self) -> int:
        return self.kr * self.nr

    def tiles(self, sides: Sides) -> tuple[int, int]:
        """Tiles along k and along n."""
        left_k, central_k, right_k = sides.k
        left_n, central_n, right_n = sides.n
        along_k = -(-left_k // self.kl) * central_k * -(-right_k // self.kr)
        along_n = -(-left_n // self.nl) * central_n * -(-right_n // self.nr)
        return along_k, along_n


def filled_up(bond: int) -> int:
    """A bond padded for the kernels: a power of two, at least `LEAST`."""
    return max(LEAST, 1 << max(bond - 1, 0).bit_length())


class Needs(NamedTuple):
    """What a tile asks of a program.

    Attributes:
        shared: bytes of shared memory, estimated: the operands of all stages, what stays, and the
            tile of W.
        accumulators: float32 numbers in registers.
        work: multiply-adds for all tiles of W and one tile of tokens' rows: those of the GEMM, of
            computing W, and the cost of reading operands. Reads count as work because the cache is
            no faster; pieces shorter than 8 cost more.
    """

    shared: int
    accumulators: int
    work: float

    @classmethod
    def of(cls, sides: Sides, extents: Cut, tile: FusedTile, itemsize: int, purpose: str) -> Needs:
        """Of a tile that is cut so."""
        a = filled_up(sides.a)
        b = filled_up(sides.b)
        k_tiles, n_tiles = extents.tiles(sides)
        area = extents.k * extents.n
        work = float(tile.m * area)
        short = max(1.0, 8 / extents.kr)
        if purpose == "gradient":
            step = tile.m * (extents.k + extents.n)
            stays = b * max(extents.rows, extents.columns)
            accumulators = area + stays
            short *= max(1.0, 8 / extents.nr)
        else:
            step = tile.m * extents.k + extents.rows * a + a * b
            stays = b * extents.columns
            accumulators = tile.m * extents.n + extents.rows * extents.columns
            work += area * (b + a * b / extents.columns)
        work += READING * step * short + STEP
        shared = itemsize * (tile.stages * step + stays + area)
        return cls(shared, accumulators, k_tiles * n_tiles * work)


def _powers(size: int) -> list[int]:
    """Powers of two up to the first that holds ``size``, or `LEAST`."""
    return [1 << k for k in range(filled_up(size).bit_length())]


@lru_cache(maxsize=4096)
def cut(sides: Sides, tile: FusedTile, itemsize: int, limit: int, purpose: str) -> Cut | None:
    """The cheapest way to cut W into tiles; ``None`` if none fits into ``limit`` bytes of shared
    memory."""
    left_k, _, right_k = sides.k
    left_n, _, right_n = sides.n
    sizes = (left_k, left_n, right_k, right_n)
    cheapest: tuple[tuple[float, ...], Cut] | None = None
    for numbers in product(*map(_powers, sizes)):
        extents = Cut(*numbers)
        if not (LEAST <= extents.rows <= tile.rows and LEAST <= extents.columns <= tile.columns):
            continue
        if not (LEAST <= extents.k <= WIDEST and LEAST <= extents.n <= WIDEST):
            continue
        needs = Needs.of(sides, extents, tile, itemsize, purpose)
        if needs.accumulators > tile.accumulators or needs.shared > limit:
            continue
        cost = (needs.work, -extents.nr, -extents.kr, -extents.nl)
        if cheapest is None or cost < cheapest[0]:
            cheapest = (cost, extents)
    if cheapest is None:
        return None
    return cheapest[1]


def best_tiles(
    tiles: tuple[FusedTile, ...], sides: Sides, rows: float, itemsize: int, limit: int, purpose: str
) -> list[tuple[FusedTile, Cut]]:
    """The two tiles with the least work for ``rows`` rows per expert, of a gradient one; as far as
    they fit."""
    able = []
    for tile in tiles:
        extents = cut(sides, tile, itemsize, limit, purpose)
        if extents is not None:
            able.append((tile, extents))

    def work(choice: tuple[FusedTile, Cut]) -> float:
        tile, extents = choice
        row_tiles = max(1.0, rows / tile.m + 0.5)  # an expert's last one is half full
        return row_tiles * Needs.of(sides, extents, tile, itemsize, purpose).work

    if purpose == "gradient":
        return able[:1]
    return sorted(able, key=work)[:2]


def fused_choice(
    like: Tensor, sides: Sides, rows: float, purpose: str = "rows"
) -> list[tuple[FusedTile, Cut]]:
    """Tiles of a fused kernel for ``rows`` rows per expert on the device of ``like``, and their
    divisions of the weight, the best one first.

    Raises:
        ValueError: no tile fits; `fused_reasons` says so beforehand.
    """
    target = architecture.target_of(like.device)
    tiles = shipped_fused(purpose, target.architecture, like.dtype)
    tiles_and_cuts = best_tiles(
        tiles, sides, rows, like.dtype.itemsize, target.shared_memory, purpose
    )
    if not tiles_and_cuts:
        raise ValueError(f"no tile of the fused kernels fits {sides} on {target.architecture}")
    return tiles_and_cuts


def fused_reasons(dims: BlockDims, dtype: torch.dtype, target: Target) -> list[str]:
    """Why a weight cannot be rebuilt on chip (empty: it can)."""
    reasons = []
    if max(dims.a, dims.b) > MOST_BOND:
        reasons.append(f"bonds {dims.a} and {dims.b} do not fit on chip; at most {MOST_BOND}")
    if dims.is_separable:
        reasons.append("a separable weight is never rebuilt")
    if reasons:
        return reasons
    for transposed, purpose in ((False, "rows"), (True, "rows"), (False, "gradient")):
        tiles = shipped_fused(purpose, target.architecture, dtype)
        sides = Sides.of(dims, transposed)
        if not best_tiles(tiles, sides, 1.0, dtype.itemsize, target.shared_memory, purpose):
            reasons.append(
                f"no {purpose} tile fits bonds {dims.a} and {dims.b} on {target.architecture}"
            )
    return list(dict.fromkeys(reasons))
