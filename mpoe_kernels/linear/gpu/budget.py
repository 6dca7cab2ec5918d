"""How many experts the kernels process at once, their memory, and the limits of 32-bit indices."""

from __future__ import annotations

from collections.abc import Collection

from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import INDICES, BlockDims, applications
from mpoe_kernels.contract.program import COMPOSITES, MERGE, Product, value_of

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
