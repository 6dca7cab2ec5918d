"""What a strategy computes, as a value: products of named tensors, in order.

A program is made once from sizes. Its FLOPs are counted product by product
(`mpoe_kernels.contract.plan`), and backends that compute product by product walk it
(`mpoe_kernels.linear.grouped`), so that there what is counted is what runs.

Names: ``x``, ``rows1``, ``rows2``, ``y`` are the rows before the first operand, between operands
and after the last one; ``L C R`` are the blocks, ``LC CR W`` what is built from them; ``d`` before
a name is its gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from mpoe_kernels.contract.orders import (
    AXES,
    SEPARABLE_ORDER,
    STRATEGIES,
    X_AXES,
    Y_AXES,
    BlockDims,
)

# Which gradients a backward computes: x, left, central, right.
Need = tuple[bool, bool, bool, bool]
ALL_GRADIENTS: Need = (True, True, True, True)
PHASES = ("forward", "backward")
# The rows that a separable forward keeps for its backward: what its central step gives.
KEPT = "rows2"

Merge = tuple[str, str, str]  # result, first, second
# What is built from blocks.
COMPOSITES = ("LC", "CR", "W")

# Kinds of products. Rows meet an operand; rows before and gradients of rows after give an operand's
# gradient; two operands make a third.
ROWS = "rows"
GRADIENT = "gradient"
MERGE = "merge"


class Product(NamedTuple):
    """One contraction of two named tensors over the axes that the result lacks.

    Attributes:
        kind: ``rows`` (rows, operand), ``gradient`` (rows, gradients of rows) or ``merge``
            (operand, operand).
        result: name of what it makes.
        first, second: names of what it reads.
        last_reads: names that no later product reads.
    """

    kind: str
    result: str
    first: str
    second: str
    last_reads: tuple[str, ...] = ()


def value_of(name: str) -> str:
    """Name of the value that a gradient belongs to; a value's own name."""
    return name.removeprefix("d ")


@dataclass(frozen=True)
class Program:
    """The products of one strategy in one phase.

    Attributes:
        strategy: one of `mpoe_kernels.contract.STRATEGIES`.
        phase: ``forward`` or ``backward``.
        order: what rows meet, e.g. ``("LC", "R")``.
        products: in the order in which they are computed.
        axes: of every name, slowest first; of the blocks and of rows in memory.
    """

    strategy: str
    phase: str
    order: tuple[str, ...]
    products: tuple[Product, ...]
    axes: Mapping[str, tuple[str, ...]] = field(hash=False)

    @cached_property
    def built(self) -> tuple[str, ...]:
        """Operands that are built on the way, or whose gradients are: their memory is temporary."""
        made = dict.fromkeys(value_of(product.result) for product in self.products)
        return tuple(name for name in made if name in COMPOSITES)

    def __str__(self) -> str:
        return "; ".join(f"{p.result} = {p.first} {p.second}" for p in self.products) or "nothing"


def _rows_name(position: int, count: int) -> str:
    if position == 0:
        return "x"
    if position == count:
        return "y"
    return f"rows{position}"


def _rows_products(order: tuple[str, ...], number: int) -> list[Product]:
    """The first products of rows with operands."""
    count = len(order)
    products = []
    for k in range(number):
        products.append(Product(ROWS, _rows_name(k + 1, count), _rows_name(k, count), order[k]))
    return products


def _axes_of(order: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Axes of every name: rows keep their remaining axes in front, what an operand brings comes
    last."""
    axes = {**AXES, "x": X_AXES, "y": Y_AXES}
    state: tuple[str, ...] = X_AXES
    for position, operand in enumerate(order[:-1], start=1):
        met = AXES[operand]
        kept = [a for a in state if a not in met]
        new = [a for a in met if a not in state]
        state = (*kept, *new)
        axes[f"rows{position}"] = state
    of_gradients = {f"d {name}": of_value for name, of_value in axes.items()}
    return axes | of_gradients


def _parts(operand: str) -> str:
    if operand == "W":
        return "LCR"
    return operand


def _merge_gradients(merges: tuple[Merge, ...], wanted: set[str]) -> list[Product]:
    """From the gradients of what was built to those of the blocks.

    A plain block's comes first: after it, nobody reads the value of the built one, whose memory can
    be used again.
    """
    products = []
    for result, first, second in reversed(merges):
        if result not in wanted:
            continue
        gradients = {
            first: Product(MERGE, f"d {first}", f"d {result}", second),
            second: Product(MERGE, f"d {second}", first, f"d {result}"),
        }
        for name in sorted(gradients, key=len):
            if name in wanted:
                products.append(gradients[name])
    return products


def _built_when_read(products: list[Product], merges: tuple[Merge, ...]) -> tuple[Product, ...]:
    """The products, what they read built just before; every one with its last reads."""
    made: set[str] = set()
    ordered: list[Product] = []

    def build(name: str) -> None:
        for result, first, second in merges:
            if result == name and name not in made:
                made.add(name)
                build(first)
                build(second)
                ordered.append(Product(MERGE, result, first, second))

    for product in products:
        build(product.first)
        build(product.second)
        ordered.append(product)
    read: set[str] = set()
    marked = []
    for product in reversed(ordered):
        names = dict.fromkeys((product.first, product.second))
        last_reads = tuple(name for name in names if name not in read)
        marked.append(product._replace(last_reads=last_reads))
        read.update(names)
    return tuple(reversed(marked))


@lru_cache(maxsize=4096)
def recipe(dims: BlockDims, strategy: str) -> tuple[tuple[Merge, ...], tuple[str, ...]]:
    """``(merges, order)``: what a strategy builds once per expert, as (result, first, second), and
    what x is then multiplied by.

    Raises:
        ValueError: an unknown strategy, or ``separable`` for a shape that is not.
    """
    if strategy == "rebuild":
        if dims.left_first:
            return (("LC", "L", "C"), ("W", "LC", "R")), ("W",)
        return (("CR", "C", "R"), ("W", "L", "CR")), ("W",)
    if strategy == "half_left":
        return (("LC", "L", "C"),), dims.half_left_order
    if strategy == "half_right":
        return (("CR", "C", "R"),), dims.half_right_order
    if strategy == "chain":
        return (), dims.chain_order
    if strategy == "separable":
        if not dims.is_separable:
            raise ValueError("strategy 'separable' needs blocks with jL = iR = 1")
        return (), SEPARABLE_ORDER
    raise ValueError(f"strategy must be one of {STRATEGIES}; got {strategy!r}")


@lru_cache(maxsize=4096)
def forward_program(dims: BlockDims, strategy: str) -> Program:
    """Rows meet a strategy's operands one after the other."""
    merges, order = recipe(dims, strategy)
    products = _rows_products(order, len(order))
    built = _built_when_read(products, merges)
    return Program(strategy, "forward", order, built, _axes_of(order))


@lru_cache(maxsize=8192)
def backward_program(dims: BlockDims, strategy: str, need: Need, kept: bool) -> Program:
    """The gradients in ``need`` from ``d y``: rows that are read are computed again, those of the
    forward come back.

    Args:
        dims: sizes of the blocks.
        strategy: one of `STRATEGIES`.
        need: which gradients: x, left, central, right.
        kept: the forward kept `KEPT`, it is given.
    """
    merges, order = recipe(dims, strategy)
    count = len(order)
    needed = {block for block, n in zip("LCR", need[1:], strict=True) if n}
    # Operands whose gradient leads to a needed one.
    wanted = {operand for operand in AXES if needed & set(_parts(operand))}
    before_needed = [need[0] or not wanted.isdisjoint(order[:k]) for k in range(count)]
    recomputed = 0  # products of rows with operands, from the first one on
    for k in range(1, count):
        if order[k] in wanted and not (kept and k == 2):
            recomputed = k
    products: list[Product] = []
    again = _rows_products(order, recomputed)
    # The rows that only C's gradient reads come last, beside what else reads x and L.
    late: list[Product] = []
    if kept:
        late = again
    else:
        products = again
    for k in reversed(range(count)):
        after = f"d {_rows_name(k + 1, count)}"
        before = _rows_name(k, count)
        # Towards x first: then nobody reads the value of a built operand, whose gradient takes its
        # memory.
        if before_needed[k]:
            products.append(Product(ROWS, f"d {before}", after, order[k]))
        if order[k] in wanted:
            gradient = Product(GRADIENT, f"d {order[k]}", before, after)
            if late and k == 1:
                late.append(gradient)
            else:
                products.append(gradient)
    products += late
    products += _merge_gradients(merges, wanted)
    built = _built_when_read(products, merges)
    return Program(strategy, "backward", order, built, _axes_of(order))


def program_of(
    dims: BlockDims, strategy: str, phase: str, need: Need = ALL_GRADIENTS, kept: bool = True
) -> Program:
    """The program of a phase. ``kept`` counts only for a separable backward, which alone reads
    `KEPT`.

    Raises:
        ValueError: an unknown strategy or phase, or ``separable`` for a shape that is not.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES}; got {phase!r}")
    if phase == "forward":
        return forward_program(dims, strategy)
    return backward_program(dims, strategy, need, kept and strategy == "separable")
