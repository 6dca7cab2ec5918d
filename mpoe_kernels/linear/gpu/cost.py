"""How many experts the kernels process at once, the number of launches, and the limits of 32-bit indices."""

from __future__ import annotations

from collections.abc import Collection
from math import ceil
from typing import NamedTuple

from mpoe_kernels.linear.gpu.work import TileSize, Work, fitted_tile
from mpoe_kernels.planner import Contraction, Hardware, Step
from mpoe_kernels.planner.orders import INDICES, BlockDims, applications
from mpoe_kernels.planner.program import COMPOSITES, MERGE, ROWS, Product, value_of

LARGEST_INDEX = 2**31 - 1  # rows and columns are counted in 32 bits, addresses in 64


def experts_at_once(dims: BlockDims, built: tuple[str, ...], experts: int) -> int:
    """Experts whose weights are built at the same time; 0: nothing is built.

    Their live memory, two composites for each expert, stays within the `budget`. An operand's gradient is not counted,
    because it reuses the memory of its value.
    """
    if not built:
        return 0
    sizes = sorted((dims.elements(INDICES[name]) for name in built), reverse=True)
    fit_two_weights = dims.weight_elements // sizes[0]
    fit_a_quarter = experts * dims.weight_elements // 4 // sum(sizes[:2])
    return max(1, fit_two_weights, fit_a_quarter)


def budget(dims: BlockDims, experts: int) -> int:
    """Maximum number of elements of temporary weights: a quarter of the dense experts', or two weights if that is
    more."""
    return max(2 * dims.weight_elements, experts * dims.weight_elements // 4)


def room(dims: BlockDims, product: Product, built: tuple[str, ...], at_once: int, experts: int) -> int:
    """Elements of the `budget` that are free while a product is computed, at least an eighth of a weight.

    Partial sums may use them.

    Args:
        dims: sizes of the blocks.
        product: one of a program's.
        built: the program's composites.
        at_once: experts whose composites are alive.
        experts: E.
    """
    alive: Collection[str] = built
    if product.kind == MERGE and value_of(product.result) not in COMPOSITES:  # the others' last readers have run
        alive = {value_of(product.first), value_of(product.second)} & set(COMPOSITES)
    return max(
        dims.weight_elements // 8, budget(dims, experts) - at_once * sum(dims.elements(INDICES[name]) for name in alive)
    )


def counting_reasons(plan: Contraction) -> list[str]:
    """Reasons if a contraction has too many rows or columns for the kernels' indices."""
    reasons = []
    rows = max((step.m * plan.slots for step in applications(plan.dims, plan.order)), default=0)
    if rows > LARGEST_INDEX:
        reasons.append(f"strategy {plan.strategy!r} would count {rows} rows; it counts to {LARGEST_INDEX}")
    if plan.dims.weight_elements > LARGEST_INDEX:
        reasons.append(f"a weight of {plan.dims.weight_elements} elements is too large; at most {LARGEST_INDEX}")
    return reasons


class Family(NamedTuple):
    """Properties of a backend's step-by-step kernels.

    Attributes:
        tiles: rows, columns and inner size of a step, the widest first.
        matrix_unit: unit of its matrix instructions, see `mpoe_kernels.linear.gpu.work.rate`; None: the card's best.
        cuts: whether products without a full grid get smaller tiles or a split inner size.
        builds_at_once: whether a weight and its half take one launch.
        with_weights: tiles for products of rows and whole weights, if different.
    """

    tiles: tuple[TileSize, ...]
    matrix_unit: str | None
    cuts: bool
    builds_at_once: bool
    with_weights: tuple[TileSize, ...] = ()


_WIDE, _NARROW = (128, 128, 64), ((64, 64, 64), (32, 64, 64), (16, 64, 64))
TRITON = Family((_WIDE, *_NARROW), None, cuts=True, builds_at_once=True)
TRITON_WIDE = TRITON._replace(with_weights=((128, 256, 64), *TRITON.tiles[1:]))
# Launches of pairs: columns of both products if these read the same rows; otherwise each has half of them.
PAIRS = ((128, 128, 32), (64, 128, 32), (32, 64, 32), (16, 64, 32))
CUDA = Family((_WIDE, _NARROW[0]), "warp", cuts=False, builds_at_once=False)
LIBRARY = Family((_WIDE,), None, cuts=False, builds_at_once=False)


def groups_of(plan: Contraction) -> tuple[int, int]:
    """How many experts' weights are built at once (1: none are), and how often the program is run."""
    at_once = experts_at_once(plan.dims, plan.program.built, plan.num_experts)
    return (min(at_once, plan.num_experts), -(-plan.num_experts // at_once)) if at_once else (1, 1)


def launches(plan: Contraction, family: Family) -> int:
    """Kernel launches: every step once for each group of experts whose built weights fit."""
    together = family.builds_at_once and any(product.result == "W" for product in plan.program.products)
    return (len(plan.steps) - together) * groups_of(plan)[1]


def _work(product: Product, step: Step, plan: Contraction, family: Family) -> Work:
    """The work of one launch of a step."""
    _, groups = groups_of(plan)
    batch, inner = max(1, round(step.batch / groups)), step.k
    if product.result == "d C":  # the sum includes the experts
        batch, inner = 1, inner * batch
    m, n = ceil(step.m), ceil(step.n)
    return Work(m, n, inner, batch, batch * m * n, plan.dtype, family.matrix_unit)


def step_seconds(product: Product, step: Step, plan: Contraction, hardware: Hardware, family: Family) -> float:
    """Predicted time of a step's launches, without launch overhead: the slowest resource determines it."""
    work = _work(product, step, plan, family)
    tiles = (product.kind == ROWS and product.second == "W" and family.with_weights) or family.tiles
    able = [tile for tile in tiles if tile[0] <= work.m] or tiles[-1:]
    fitted = [fitted_tile(tile, work) for tile in able]
    splits, tile = 1, fitted[0]
    if family.cuts and product.kind != ROWS:
        tile = work.best_tile(fitted, hardware)
        splits = work.best_splits(tile, hardware)
    at_once, groups = groups_of(plan)
    memory = step.memory_bytes(hardware.cache_bytes / at_once) / hardware.bandwidth
    return max(groups * work.seconds(tile, splits, hardware), memory)


def gpu_seconds(plan: Contraction, hardware: Hardware, family: Family) -> float:
    """Predicted time of the launches of a program."""
    products = zip(plan.program.products, plan.steps, strict=bool(plan.steps))
    computing = sum(step_seconds(product, step, plan, hardware, family) for product, step in products)
    return computing + launches(plan, family) * hardware.launch_seconds


def _pair_seconds(step: Step, plan: Contraction, hardware: Hardware, shared: bool) -> float:
    """Predicted time of a launch of pairs: a step of both projections; ``shared``: from the same rows."""
    m, n = ceil(step.m), ceil(step.n)
    batch, columns = (step.batch, 2 * n) if shared else (2 * step.batch, n)
    work = Work(m, columns, step.k, batch, batch * m * columns, plan.dtype)
    tile = next((tile for tile in PAIRS if tile[0] <= m), PAIRS[-1])
    own = tile if shared else (tile[0], tile[1] // 2, tile[2])
    rows = plan.slots * plan.dims.in_features * plan.dtype.itemsize if shared else 0
    memory = (2 * step.memory_bytes(hardware.cache_bytes / 2) - rows) / hardware.bandwidth
    return max(work.seconds(fitted_tile(own, work), 1, hardware), memory)


def gated_seconds(plan: Contraction, hardware: Hardware, family: Family) -> float:
    """Predicted time of both projections of a gated network: a launch for each product of rows, two for all others.

    Their product with each other is part of the last launch.
    """
    groups, found = groups_of(plan)[1], 0.0
    for product, step in zip(plan.program.products, plan.steps, strict=bool(plan.steps)):
        if product.kind == ROWS:
            found += _pair_seconds(step, plan, hardware, product.first == "x")
        else:
            found += 2 * step_seconds(product, step, plan, hardware, family)
    rows = sum(product.kind == ROWS for product in plan.program.products) if plan.steps else 0
    return found + (2 * launches(plan, family) - rows * groups) * hardware.launch_seconds


def multiply_seconds(plan: Contraction, hardware: Hardware) -> float:
    """Predicted time of PyTorch's product of two results of a forward."""
    moved = 3 * plan.slots * plan.dims.out_features * plan.dtype.itemsize
    return moved / hardware.bandwidth + hardware.launch_seconds
