"""Orders of contracting {x, left, central, right}: sizes, FLOPs and the cheapest order inside each
strategy.

The blocks ``L [iL, jL, a]``, ``C [a, iC, jC, b]``, ``R [b, iR, jR]`` and the rows ``x [n, iL, iC,
iR]`` form a network in which every index joins two tensors or is an index of the result ``y [n, jL,
jC, jR]``. So contracting two tensors costs one multiply-add for each element of the union of their
indices, and the result has the symmetric difference (Smith and Gray, "opt_einsum", JOSS 2018, count
the same way). Nothing here depends on the number of rows: all orders of a strategy scale with it in
the same way.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import torch

from mpoe_kernels.mpo.shape import MPOShape

# Axes of the blocks and of what is built from them, in memory order. "LC" and "CR" are half-built
# weights, "W" is the whole one.
AXES = {
    "L": ("iL", "jL", "a"),
    "C": ("a", "iC", "jC", "b"),
    "R": ("b", "iR", "jR"),
    "LC": ("iL", "jL", "iC", "jC", "b"),
    "CR": ("a", "iC", "jC", "iR", "jR"),
    "W": ("iL", "jL", "iC", "jC", "iR", "jR"),
}
X_AXES = ("iL", "iC", "iR")
Y_AXES = ("jL", "jC", "jR")
INDICES = {name: frozenset(axes) for name, axes in AXES.items()}
X_INDICES = frozenset(X_AXES)

STRATEGIES = ("rebuild", "half_left", "half_right", "chain", "separable")
SEPARABLE_ORDER = ("L", "C", "R")
# A chain writes the rows between two operands and copies them into the order that the next one
# needs. An element takes as long as about this many FLOPs on a core; on a GPU, whose arithmetic is
# faster still, as long as more.
MOVE_FLOPS = 150


class BlockDims(NamedTuple):
    """Sizes of the folded blocks and of the true weight."""

    iL: int
    jL: int
    a: int
    iC: int
    jC: int
    b: int
    iR: int
    jR: int
    in_features: int
    out_features: int

    @classmethod
    def of_blocks(
        cls,
        left: torch.Tensor,
        central: torch.Tensor,
        right: torch.Tensor,
        in_features: int,
        out_features: int,
    ) -> BlockDims:
        """Sizes of ``left [E, iL, jL, a]``, ``central [a, iC, jC, b]``, ``right [E, b, iR,
        jR]``."""
        _, rows_l, cols_l, a = left.shape
        _, rows_c, cols_c, b = central.shape
        _, _, rows_r, cols_r = right.shape
        return cls(rows_l, cols_l, a, rows_c, cols_c, b, rows_r, cols_r, in_features, out_features)

    @classmethod
    def of_shape(cls, shape: MPOShape) -> BlockDims:
        """Sizes of the blocks of a shape."""
        return cls(
            **shape.block_dims, in_features=shape.in_features, out_features=shape.out_features
        )

    def elements(self, indices: frozenset[str]) -> int:
        """Product of the sizes of ``indices``: elements of a tensor, or multiply-adds of a
        contraction."""
        return math.prod(getattr(self, index) for index in indices)

    @property
    def is_separable(self) -> bool:
        return self.jL == 1 and self.iR == 1

    @property
    def weight_elements(self) -> int:
        """Elements of one rebuilt weight, padding included."""
        return self.iL * self.jL * self.iC * self.jC * self.iR * self.jR

    @property
    @lru_cache  # noqa: B019 (of few sizes, no larger than their key; every call that rebuilds asks)
    def left_first(self) -> bool:
        """Whether rebuilding should contract left with central before right (because that is
        cheaper)."""
        return _rebuild_flops(self, True) <= _rebuild_flops(self, False)

    @property
    def half_left_order(self) -> tuple[str, ...]:
        """Order in which x is multiplied by ``LC`` and ``R``: ``("LC", "R")`` or ``("R",
        "LC")``."""
        return _cheapest_order(self, ("LC", "R"))

    @property
    def half_right_order(self) -> tuple[str, ...]:
        """Order in which x is multiplied by ``L`` and ``CR``: ``("L", "CR")`` or ``("CR",
        "L")``."""
        return _cheapest_order(self, ("L", "CR"))

    @property
    def chain_order(self) -> tuple[str, ...]:
        """Order in which x is multiplied by ``L``, ``C`` and ``R``: the cheapest of six, moves of
        the rows included."""
        return _cheapest_order(self, SEPARABLE_ORDER, MOVE_FLOPS)

    @property
    def rebuild_flops(self) -> int:
        """FLOPs of rebuilding one expert's weight in the cheaper order."""
        return _rebuild_flops(self, self.left_first)


def exchanged(dims: BlockDims) -> BlockDims:
    """The problem with rows and columns of the weight exchanged, for products with gradients of
    y."""
    d = dims
    return BlockDims(d.jL, d.iL, d.a, d.jC, d.iC, d.b, d.jR, d.iR, d.out_features, d.in_features)


def meets_half_first(dims: BlockDims, strategy: str) -> bool:
    """Whether the order of a half strategy meets the half-built weight before the remaining
    block."""
    return "C" in (dims.half_right_order if strategy == "half_right" else dims.half_left_order)[0]


def expected_busy_experts(num_experts: int, slots: int) -> int:
    """Expected number of experts that get at least one of ``slots`` under uniform random routing,
    rounded."""
    if slots == 0:
        return 0
    return max(1, round(num_experts * (1 - (1 - 1 / num_experts) ** slots)))


class Application(NamedTuple):
    """One contraction of rows with an operand, per slot.

    Attributes:
        operand: key of `INDICES`.
        before, after: elements of the rows per slot before and after.
        m: rows of the GEMM per slot.
        n, k: columns and inner size of the GEMM.
    """

    operand: str
    before: int
    after: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k


def merge_flops(dims: BlockDims, first: str, second: str) -> int:
    """FLOPs of contracting two operands with each other, for one expert."""
    return 2 * dims.elements(INDICES[first] | INDICES[second])


@lru_cache(maxsize=4096)
def applications(dims: BlockDims, order: tuple[str, ...]) -> tuple[Application, ...]:
    """The products of x with the operands in ``order``; together the operands make the whole
    weight."""
    state = X_INDICES
    steps = []
    for operand in order:
        met = INDICES[operand]
        after = state ^ met
        step = Application(
            operand,
            before=dims.elements(state),
            after=dims.elements(after),
            m=dims.elements(state - met),
            n=dims.elements(met - state),
            k=dims.elements(state & met),
        )
        steps.append(step)
        state = after
    return tuple(steps)


def order_flops(dims: BlockDims, order: tuple[str, ...]) -> int:
    """FLOPs of one row through the operands of ``order``."""
    return sum(step.flops for step in applications(dims, order))


@lru_cache(maxsize=4096)
def _cheapest_order(
    dims: BlockDims, operands: tuple[str, ...], move_flops: int = 0
) -> tuple[str, ...]:
    """The order with the fewest FLOPs per row, and ``move_flops`` for every element of the rows
    between two operands; on ties the first one listed."""

    def cost(order: tuple[str, ...]) -> int:
        moved = sum(step.after for step in applications(dims, order)[:-1])
        return order_flops(dims, order) + move_flops * moved

    return min(permutations(operands), key=cost)


@lru_cache(maxsize=4096)
def _rebuild_flops(dims: BlockDims, left_first: bool) -> int:
    if left_first:
        return merge_flops(dims, "L", "C") + merge_flops(dims, "LC", "R")
    return merge_flops(dims, "C", "R") + merge_flops(dims, "L", "CR")
