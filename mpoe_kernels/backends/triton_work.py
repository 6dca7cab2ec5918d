"""The work of a launch of the catalogue: its product, and the overhead that it executes in addition."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from mpoe_kernels.hidden_experts.triton import launch as hidden
from mpoe_kernels.hidden_experts.triton.tiles import Tile, rows_per_token
from mpoe_kernels.linear.triton.fused_tiles import Cut, Sides, rebuild_work


def _padded(arguments: Mapping[str, Any], **tiles: str) -> float:
    """FLOPs of whole tiles divided by those of the product: ``size="tile"`` names a dimension and its block size."""
    sizes = [(arguments[size], arguments[tile]) for size, tile in tiles.items()]
    return math.prod(-(-size // tile) * tile / size for size, tile in sizes)


def _fused(arguments: Mapping[str, Any]) -> float:
    """Whole tiles of W, and the cost of building them relative to multiplying with them."""
    sides = Sides(arguments["K_SIZES"], arguments["N_SIZES"], arguments["A"], arguments["B"])
    cut = Cut(*(arguments[name] for name in ("KL", "NL", "KR", "NR")))
    tiles = math.prod(cut.tiles(sides)) * cut.k * cut.n / math.prod(sides.k + sides.n)
    return tiles * (1 + rebuild_work(sides, cut, arguments["BUILT"]) / arguments["BM"])


def _hidden_rows(arguments: Mapping[str, Any]) -> float:
    """Rows of whole tiles, whole units of blocks, and the inputs that every part of a block's results recomputes."""
    tile = Tile(*(arguments[name] for name in ("BT", "BM", "BN", "BK", "num_warps")))
    experts, top_k, products = arguments["EXPERTS"], arguments["TOP_K"], _hidden_products(arguments)
    parts, results = -(-arguments["B"] // tile.units), 2 if "grad" in arguments and arguments["GATED"] else 1
    again = (results + parts * (products - results)) / products
    units = (parts * tile.units / arguments["B"]) ** 2
    return rows_per_token(tile, experts, top_k) / top_k * units * again


# FLOPs of a launch divided by those of its product: padding of tiles, and rebuilding for every tile. The partial last
# tile of every expert comes on top: half a tile on average.
FLOP_OVERHEAD: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "rows_kernel": partial(_padded, K="BK", N="BN"),
    "pairs_kernel": partial(_padded, K="BK", N="BN"),
    "outer_kernel": partial(_padded, M="BM", N="BN"),
    "blocks_kernel": partial(_padded, M="BM", N="BN", K="BK"),
    "weights_kernel": partial(_padded, M="BM"),
    "fused_kernel": _fused,
    "hidden_forward_kernel": _hidden_rows,
    "hidden_rows_kernel": _hidden_rows,
}


class Product(NamedTuple):
    """GEMMs of one size that a launch computes: ``[m, k] x [k, n]``, one for each of ``batch`` experts (1: for all)."""

    m: float
    n: int
    k: float
    batch: int


def _rows_product(a: Mapping[str, Any], rows: float) -> Product:
    grouped = a["GROUPED"]
    return Product((rows if grouped else a["slots"]) * a["M"], a["N"], a["K"], a["EXPERTS"] if grouped else 1)


def _pairs_product(a: Mapping[str, Any], rows: float) -> Product:
    return (one := _rows_product(a, rows))._replace(n=2 * one.n)


def _outer_product(a: Mapping[str, Any], rows: float) -> Product:
    grouped = a["GROUPED"]
    return Product(a["M"], a["N"], (rows if grouped else a["g"].shape[0]) * a["S"], a["EXPERTS"] if grouped else 1)


def _blocks_product(a: Mapping[str, Any], _: float) -> Product:
    return Product(a["M"], a["N"], a["K"], a["experts"])


def _weights_product(a: Mapping[str, Any], _: float) -> Product:
    """The product of the half, counted as wide as the weight, and that of the weight."""
    return Product(a["M"] * a["CELLS"], a["N"], a["S"] * (1 + a["K"] / a["N"]), a["offsets"].shape[0] - 1)


def _fused_product(a: Mapping[str, Any], rows: float) -> Product:
    return Product(rows, math.prod(a["N_SIZES"]), math.prod(a["K_SIZES"]), a["EXPERTS"])


def _gradient_product(a: Mapping[str, Any], rows: float) -> Product:
    return Product(math.prod(a["K_SIZES"]), math.prod(a["N_SIZES"]), rows, a["offsets"].shape[0] - 1)


def _hidden_products(a: Mapping[str, Any]) -> int:
    return hidden.PRODUCTS["rows" if "grad" in a else "forward", a["GATED"]]


def _hidden_product(a: Mapping[str, Any], _: float) -> Product:
    """Rows of chosen experts times the blocks of every group."""
    rows = a["index"].numel() * a["F"] // a["B"]
    return Product(rows, a["B"], a["B"] * _hidden_products(a), 1)


def _hidden_blocks_product(a: Mapping[str, Any], _: float) -> Product:
    """Slots through blocks forward and backward, as in the rows' gradients, and the products between them."""
    gradients = 3 if a["GATED"] else 2
    through = hidden.PRODUCTS["forward", a["GATED"]]
    return Product(a["B"], a["B"] * (gradients + through), a["pair_of_slot"].numel() * a["F"] // a["B"], 1)


# The product of a launch, from its arguments and the rows of one expert; kernels not listed here have none.
PRODUCTS: dict[str, Callable[[Mapping[str, Any], float], Product]] = {
    "rows_kernel": _rows_product,
    "pairs_kernel": _pairs_product,
    "outer_kernel": _outer_product,
    "blocks_kernel": _blocks_product,
    "weights_kernel": _weights_product,
    "fused_kernel": _fused_product,
    "left_gradient_kernel": _gradient_product,
    "right_gradient_kernel": _gradient_product,
    "hidden_forward_kernel": _hidden_product,
    "hidden_rows_kernel": _hidden_product,
    "hidden_blocks_kernel": _hidden_blocks_product,
}
