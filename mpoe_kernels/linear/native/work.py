"""The work of the compiled CPU kernels for a contraction.

The products of csrc/cpu/linear, divided into register tiles, and the copies between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mpoe_kernels.native_library import NATIVE_LIBRARY
from mpoe_kernels.planner import BlockDims, Contraction
from mpoe_kernels.planner.cost import new_bytes
from mpoe_kernels.planner.orders import applications

# csrc/cpu/gemm/gemm.h: columns of a packed panel, columns that stay together.
PANEL, GRANULE = 32, 8
FLOAT_BYTES = 4
# csrc/cpu/linear/half.h: bytes of a half-built weight worked on at a time.
CHUNK_BYTES = 256 * 1024
# csrc/cpu/linear/rebuild.cpp: blocks of iC of a backward, with separate sums.
MOST_BLOCKS = 16
# csrc/cpu/linear/half_backward.cpp, chain_backward.cpp: groups of experts or slots with separate sums.
MOST_GROUPS = 8
# csrc/cpu/linear/chain.cpp, chain.h: bytes of the states of a block of slots, rows for which C is packed by piece.
BLOCK_BYTES, FEW_ROWS, FEW_GRADIENT_ROWS = 512 * 1024, 64, 128
# csrc/cpu/linear/separable.h: slots for which a backward reads central in place and writes its gradient directly.
FEW_GRADIENTS = 64


class Tiles(NamedTuple):
    """How the register tiles of an instruction set multiply.

    Attributes:
        rows: maximum rows of a tile.
        longest_sum: units of k in one pass.
        load_rows: a tile loads a row of its panel for every unit of k; this takes as long as the multiply-adds of this
            many additional rows.
    """

    rows: int
    longest_sum: int
    load_rows: float


# csrc/cpu/gemm/body.h, and gemm_amx.cpp, which multiplies bfloat16 sixteen units at a time and leaves sums below
# `AMX_UNITS`, and remainders, to vectors, whose multiply-add takes as long as `VECTOR_WEIGHT` of AMX's.
# AVX2's tiles have 6 rows, and its measured constants make up for it.
VECTORS, AMX = Tiles(14, 384, 1.0), Tiles(32, 1024, 4.0)
AMX_UNITS, AMX_STEP, VECTOR_WEIGHT = 32, 16, 4.0


def instructions() -> str:
    """The instruction set that the compiled kernels use; without them, the one of the table's constants."""
    return NATIVE_LIBRARY.info.get("isa_used", "avx512bf16")


def tiles_of(isa: str, dtype: torch.dtype) -> Tiles:
    """The tiles for long sums."""
    return AMX if isa == "amx" and dtype == torch.bfloat16 else VECTORS


def round_up(count: float, step: int) -> int:
    """The next multiple of ``step``."""
    return math.ceil(count / step) * step


@dataclass
class Work:
    """Work of one call, on all cores together.

    Attributes:
        plan: the contraction.
        flops: FLOPs of all tiles, including padded panels and loads; with AMX, vector work is converted to equivalent
            FLOPs.
        tiles: stored tiles.
        copied: elements that copies read and write.
        copied_by_all: those of copies that all threads share, however few the tasks (`tasks_of`) are.
        summed: elements of sums over experts, in memory, that products read and write.
        new: bytes of results and scratch memory that are expected to be new from the system.
        new_by_all: those that all threads are the first to write.
    """

    plan: Contraction
    flops: float = 0.0
    tiles: float = 0.0
    copied: float = 0.0
    copied_by_all: float = 0.0
    summed: float = 0.0
    new: float = 0.0
    new_by_all: float = 0.0
    isa: str = field(default_factory=lambda: instructions())

    @property
    def unit(self) -> int:
        """Elements of k per multiply-add: 1 for float32, 2 for bfloat16."""
        return 4 // self.plan.dtype.itemsize

    def multiply(self, count: float, rows: float, columns: float, k: float) -> None:
        """``count`` products [rows, k] [k, columns], the columns in packed panels."""
        panels, units = math.ceil(columns / PANEL), math.ceil(k / self.unit)
        kind = tiles_of(self.isa, self.plan.dtype)
        if kind is AMX:
            by_amx = units // AMX_STEP * AMX_STEP if units >= AMX_UNITS else 0
            self._add(VECTORS, count, rows, panels, units - by_amx, VECTOR_WEIGHT)
            units = by_amx
        self._add(kind, count, rows, panels, units)

    def _add(self, kind: Tiles, count: float, rows: float, panels: int, units: int, weight: float = 1.0) -> None:
        tiles = math.ceil(rows / kind.rows)
        self.flops += weight * 2 * count * (rows + kind.load_rows * tiles) * panels * PANEL * units * self.unit
        self.tiles += count * tiles * panels * math.ceil(units / kind.longest_sum)

    def copy(self, elements: float) -> None:
        """A copy into another order."""
        self.copied += elements

    def allocate(self, elements: float, itemsize: int | None = None) -> None:
        """An array, by default of the contraction's dtype."""
        self.new += new_bytes(elements * (itemsize or self.plan.dtype.itemsize))

    def copy_by_all(self, elements: float) -> None:
        """A copy by all threads into another order, in an array of its own."""
        self.copied_by_all += elements
        self.new_by_all += new_bytes(elements * self.plan.dtype.itemsize)

    def touch(self, elements: float) -> None:
        """Reading or writing an array once: half of a copy."""
        self.copied += elements / 2

    def add_to_sum(self, elements: float) -> None:
        """A sum over experts that exceeds a core's cache."""
        self.summed += elements


def _results(work: Work) -> None:
    """Memory of y, or of the gradients."""
    plan, d = work.plan, work.plan.dims
    if plan.phase == "forward":
        work.allocate(plan.slots * d.out_features)
        return
    sizes = (
        plan.slots * d.in_features,
        plan.num_experts * d.iL * d.jL * d.a,
        d.a * d.iC * d.jC * d.b,
        plan.num_experts * d.b * d.iR * d.jR,
    )
    for elements, needed in zip(sizes, plan.need, strict=True):
        if needed:
            work.allocate(elements)


def _most_groups(plan: Contraction) -> int:
    """Most groups with their own sums of the central gradient, which may take as much as two weights."""
    d = plan.dims
    return max(1, 2 * d.weight_elements * plan.dtype.itemsize // (d.a * d.iC * d.jC * d.b * FLOAT_BYTES))


def _rebuild(work: Work) -> None:
    plan, d, experts = work.plan, work.plan.dims, work.plan.busy_experts
    m, pairs, left, right = plan.slots / experts, d.iC * d.jC, d.iL * d.jL, d.iR * d.jR
    rows, central, half = plan.slots * (d.in_features + d.out_features), d.a * pairs * d.b, experts * pairs * left * d.b
    if plan.phase == "forward":
        work.copy(central + rows)
        work.allocate(central)
        work.multiply(experts * pairs, left, d.b, d.a)
        work.multiply(experts * pairs, left, d.iR * round_up(d.jR, GRANULE), d.b)
        work.multiply(experts, m, d.out_features, d.in_features)
        return
    x_needed, left_needed, central_needed, right_needed = plan.need
    if x_needed or right_needed:
        work.copy(experts * central)
        work.multiply(experts * pairs, left, d.b, d.a)
    if x_needed:
        work.multiply(experts * pairs, left, d.jR * round_up(d.iR, GRANULE), d.b)
        work.copy(rows)
        work.multiply(experts, m, d.in_features, d.out_features)
    if not any(plan.need[1:]):
        return
    work.copy(rows)
    work.multiply(experts * pairs, d.iL * d.iR, d.jL * round_up(d.jR, GRANULE), m)
    if right_needed:
        work.copy(half + experts * pairs * left * right)
        work.multiply(experts, d.b, right, pairs * left)
    if left_needed or central_needed:
        work.multiply(experts, pairs * left, d.b, right)
    if left_needed:
        work.copy(experts * central)
        work.multiply(experts, left, d.a, pairs * d.b)
    if central_needed:
        work.copy(half)
        work.allocate(central, FLOAT_BYTES)
        work.multiply(experts, d.a, pairs * d.b, left)
        work.add_to_sum(experts * d.a * pairs * d.b)


def exchanged(d: BlockDims) -> BlockDims:
    """The problem with rows and columns of the weight exchanged, for products with dz."""
    return BlockDims(d.jL, d.iL, d.a, d.jC, d.iC, d.b, d.jR, d.iR, d.out_features, d.in_features)


def mirrored(d: BlockDims) -> BlockDims:
    """Left and right exchanged: half_right is half_left of this."""
    return BlockDims(d.iR, d.jR, d.b, d.iC, d.jC, d.a, d.iL, d.jL, d.in_features, d.out_features)


def meets_half_first(d: BlockDims, strategy: str) -> bool:
    """Whether the order of a half strategy meets the half-built weight before the remaining block."""
    return "C" in (d.half_right_order if strategy == "half_right" else d.half_left_order)[0]


def _half_rows(work: Work, d: BlockDims, half_first: bool) -> None:
    """LC of every expert, and rows through it and right."""
    slots, experts, b = work.plan.slots, work.plan.busy_experts, round_up(d.b, GRANULE)
    work.copy(d.a * d.iC * d.jC * d.b + slots * (d.in_features + d.out_features))
    work.multiply(experts * d.iC, d.iL * d.jL, d.jC * b, d.a)
    if half_first:
        work.copy(experts * d.iL * d.jL * d.iC * d.jC * b)
        work.multiply(experts * d.jL, slots / experts * d.iR, d.jC * b, d.iC * d.iL)
        work.multiply(slots, d.jL * d.jC, d.jR, d.iR * b)
    else:
        columns = round_up(d.jR, GRANULE)
        work.multiply(slots, d.iL * d.iC, b * columns, d.iR)
        work.multiply(experts, d.jL * d.jC, slots / experts * columns, d.iL * d.iC * b)


def _half(work: Work) -> None:
    plan = work.plan
    d = plan.dims
    if plan.strategy == "half_right":
        times = 1 if plan.phase == "forward" else 2
        blocks = plan.busy_experts * (d.iL * d.jL * d.a + d.b * d.iR * d.jR) + d.a * d.iC * d.jC * d.b
        work.copy(times * (plan.slots * (d.in_features + d.out_features) + blocks))
        d = mirrored(d)
    work.allocate(d.a * d.iC * d.jC * d.b)
    half_first = meets_half_first(plan.dims, plan.strategy)
    if plan.phase == "forward":
        _half_rows(work, d, half_first)
        return
    x_needed, left_needed, central_needed, right_needed = plan.need
    if plan.strategy == "half_right":
        left_needed, right_needed = right_needed, left_needed
    if x_needed:
        _half_rows(work, exchanged(d), meets_half_first(exchanged(plan.dims), plan.strategy))
    if not half_first:
        d = exchanged(d)
    experts, b = plan.busy_experts, round_up(d.b, GRANULE)
    inner, m = d.iC * d.jC * b, plan.slots / experts
    if right_needed:
        work.multiply(experts * d.iC, d.iL * d.jL, d.jC * b, d.a)
        work.copy(experts * d.iL * d.jL * inner + plan.slots * d.in_features)
        work.multiply(experts * d.jL, m * d.iR, d.jC * b, d.iC * d.iL)
        work.copy(plan.slots * d.jL * d.jC * (d.iR * b + d.jR))
        work.multiply(experts, d.iR * b, d.jR, m * d.jL * d.jC)
    if left_needed or central_needed:
        work.copy(plan.slots * (d.in_features + d.out_features))
        work.multiply(plan.slots, d.jL * d.jC, b * d.iR, d.jR)
        work.multiply(experts * d.jL, d.iC * d.iL, d.jC * b, m * d.iR)
        work.copy(experts * d.iL * d.jL * inner)
    if left_needed:
        work.multiply(experts * d.jL, d.iL, d.a, inner)
    if central_needed:
        chunk = min(d.jL, max(1, CHUNK_BYTES // (d.iL * inner * plan.dtype.itemsize)))
        passes = math.ceil(d.jL / chunk)
        work.copy(experts * d.iL * d.jL * inner)
        groups = min(_most_groups(plan), plan.num_experts, MOST_GROUPS)
        work.allocate(groups * d.a * inner, FLOAT_BYTES)
        work.multiply(experts * passes, d.a, inner, chunk * d.iL)
        work.add_to_sum(experts * passes * d.a * inner)


def _separable(work: Work) -> None:
    plan, d, experts = work.plan, work.plan.dims, work.plan.busy_experts
    slots, m = plan.slots, plan.slots / experts
    x_needed, left_needed, central_needed, right_needed = plan.need
    central = d.a * d.iC * d.jC * d.b
    if plan.phase == "forward":
        work.copy(central + slots * d.in_features + experts * (d.iL * d.a + d.b * d.jR))
        work.multiply(experts, m * d.iC, d.a, d.iL)
        work.multiply(1, slots, d.jC * d.b, d.iC * d.a)
        work.multiply(experts, m * d.jC, d.jR, d.b)
        return
    if central_needed:
        work.copy(slots * d.in_features + experts * d.iL * d.a)
        work.multiply(experts, m * d.iC, d.a, d.iL)
    if x_needed or left_needed or central_needed:
        work.copy(experts * d.b * d.jR)
        work.multiply(experts, m * d.jC, d.b, d.jR)
    few = slots <= FEW_GRADIENTS and d.b % work.unit == 0
    if x_needed or left_needed:
        (work.touch if few else work.copy)(central)
        work.multiply(1, slots, d.iC * d.a, d.jC * d.b)
    if x_needed:
        work.copy(slots * d.in_features + experts * d.iL * d.a)
        work.multiply(experts, m * d.iC, d.iL, d.a)
    if right_needed:
        work.copy(slots * d.jC * (d.b + d.jR))
        work.multiply(experts, d.b, d.jR, m * d.jC)
    if left_needed:
        work.copy(slots * d.iC * (d.iL + d.a))
        work.multiply(experts, d.iL, d.a, m * d.iC)
    if central_needed:
        work.copy(slots * (d.iC * d.a + d.jC * d.b))
        (work.touch if few else work.copy)(central)
        work.multiply(1, d.iC * d.a, d.jC * d.b, slots)


def _has_few_rows(plan: Contraction) -> bool:
    """Whether the product of a chain with the central block has so few rows that the block need not be packed whole."""
    rows = plan.slots * applications(plan.dims, plan.order)[plan.order.index("C")].m
    return rows <= (FEW_ROWS if plan.phase == "forward" else FEW_GRADIENT_ROWS)


def central_is_in_order(plan: Contraction) -> bool:
    """Whether a chain finds the central block in the order that its product needs: first (few rows) or after left."""
    d = plan.dims
    if plan.order[0] == "C":
        return _has_few_rows(plan) and d.jC * d.b % PANEL == 0
    if plan.order[:2] != ("L", "C"):
        return False
    step = applications(d, plan.order)[1]
    return plan.slots * step.m < step.n or 1 in (d.a, d.iC)


def packs_by_piece(plan: Contraction) -> bool:
    """Whether a chain packs pieces of the central block as it needs them, and keeps them in cache."""
    return _has_few_rows(plan) and central_is_in_order(plan)


def _chain(work: Work) -> None:
    """States of the rows, copied before every product; a backward recomputes them."""
    plan, slots, steps = work.plan, work.plan.slots, applications(work.plan.dims, work.plan.order)
    x_needed, *blocks_needed = plan.need
    wanted = [dict(zip("LCR", blocks_needed, strict=True))[step.operand] for step in steps]
    forward, by_piece = plan.phase == "forward", packs_by_piece(plan)
    last = len(steps) if forward else max((k for k in range(len(steps)) if wanted[k]), default=-1)
    for k, step in enumerate(steps):
        is_central = step.operand == "C"
        experts = 1 if is_central else plan.busy_experts
        operand, rows = step.k * step.n, step.m * slots / experts
        pack = work.copy_by_all if is_central and not by_piece else work.copy
        if k <= last:
            work.copy(slots * step.before)
        if is_central and not central_is_in_order(plan):
            work.copy_by_all(operand)
        if k < last:
            pack(experts * operand)
            work.multiply(experts, rows, step.n, step.k)
        if forward:
            continue
        before_needed = x_needed or any(wanted[:k])
        if before_needed or wanted[k]:
            work.copy(slots * step.after)
        if wanted[k]:
            work.copy(slots * (step.before + step.after))
            work.multiply(experts, step.k, step.n, rows)
        if before_needed:
            pack(experts * operand)
            work.multiply(experts, rows, step.k, step.n)
        if wanted[k] and is_central and by_piece:
            work.touch(operand)
        elif wanted[k] and is_central:
            widest = max(s.before + s.after for s in steps) * plan.dtype.itemsize
            work.add_to_sum(slots / max(1, BLOCK_BYTES // widest) * operand)
            work.allocate(min(_most_groups(plan), slots, MOST_GROUPS) * operand, FLOAT_BYTES)


_WORK: dict[str, Callable[[Work], None]] = {
    "rebuild": _rebuild,
    "half_left": _half,
    "half_right": _half,
    "chain": _chain,
    "separable": _separable,
}


def tasks_of(plan: Contraction) -> int | None:
    """Number of equal tasks shared by the threads; None: unlimited."""
    if plan.strategy == "separable" or (plan.phase == "forward" and plan.strategy == "rebuild"):
        return None
    if plan.strategy == "chain" and packs_by_piece(plan):
        return None
    if plan.phase == "forward":
        return plan.slots if plan.strategy == "chain" else plan.busy_experts
    if plan.strategy == "rebuild":
        return math.ceil(plan.dims.iC / math.ceil(plan.dims.iC / MOST_BLOCKS))
    return min(plan.slots if plan.strategy == "chain" else plan.busy_experts, MOST_GROUPS)


def work_of(plan: Contraction) -> Work:
    """What computing ``plan`` takes; nothing without rows or without gradients to compute."""
    work = Work(plan)
    if plan.steps:
        _results(work)
        _WORK[plan.strategy](work)
    return work
