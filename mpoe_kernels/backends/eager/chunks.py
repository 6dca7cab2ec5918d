"""Rows in chunks of whole experts, and how a state of the rows meets an operand.

A state of the rows is a tensor ``[slots, axes...]``. An operand (L, C, R, or a half-built weight LC or CR) contracts
the axes it shares with the state (``met``) and puts its others (``new``) behind what remains (``rest``): one GEMM with
``K = met``, grouped by expert, or for C, which the experts share, over all slots at once. Slots are taken in chunks of
whole experts, so that half-built weights stay below two weights' memory and states stay small.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.grouped import Group, active_groups, grouped_mm, select_experts
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.orders import applications, recipe

AXES = {
    "L": ("iL", "jL", "a"),
    "C": ("a", "iC", "jC", "b"),
    "R": ("b", "iR", "jR"),
    "LC": ("iL", "jL", "iC", "jC", "b"),
    "CR": ("a", "iC", "jC", "iR", "jR"),
}
ROWS_IN, ROWS_OUT = ("iL", "iC", "iR"), ("jL", "jC", "jR")
# Half-built weights of a chunk of experts: this part of a weight. They exist up to twice (the rows may need another
# layout than the one they are built in), and so do their gradients.
HALF_SHARE = 0.5
# States of a chunk of experts (one expert's may be larger): about what a last-level cache holds.
STATE_BYTES = 32 << 20


class Step(NamedTuple):
    """Axes of the state before an operand, those that stay, those it contracts, those it brings."""

    operand: str
    before: tuple[str, ...]
    rest: tuple[str, ...]
    met: tuple[str, ...]
    new: tuple[str, ...]

    @property
    def after(self) -> tuple[str, ...]:
        return self.rest + self.new


@lru_cache(maxsize=64)
def row_steps(order: tuple[str, ...]) -> tuple[Step, ...]:
    """Layouts of the states when rows meet the operands of ``order``."""
    state: tuple[str, ...] = ROWS_IN
    found: list[Step] = []
    for operand in order:
        axes = AXES[operand]
        met = tuple(axis for axis in state if axis in axes)
        rest = tuple(axis for axis in state if axis not in axes)
        found.append(Step(operand, state, rest, met, tuple(axis for axis in axes if axis not in met)))
        state = found[-1].after
    return tuple(found)


def axis_sizes(dims: BlockDims, axes: tuple[str, ...]) -> list[int]:
    return [getattr(dims, axis) for axis in axes]


def arrange(t: Tensor, dims: BlockDims, before: tuple[str, ...], after: tuple[str, ...]) -> Tensor:
    """``[n, before...] -> [n, after...]``, a view; ``t`` has any shape with that many elements."""
    named = t.reshape(-1, *axis_sizes(dims, before))
    return named.permute(0, *(1 + before.index(axis) for axis in after))


def repeated(matrix: Tensor, times: int) -> Tensor:
    """For `torch.bmm`, whose way of computing, unlike `torch.matmul`'s, never depends on ``requires_grad``."""
    return matrix.expand(times, *matrix.shape)


class Chunk:
    """Some experts' operands as matrices ``[experts, met, new]``, built when first asked for."""

    def __init__(self, blocks: dict[str, Tensor], dims: BlockDims, groups: list[Group]) -> None:
        self.blocks, self.dims = blocks, dims
        self.start, self.stop = groups[0][1], groups[-1][2]
        self.experts = [e for e, _, _ in groups]
        self.counts = [stop - start for _, start, stop in groups]
        self.halves: dict[str, Tensor] = {}

    @property
    def slots(self) -> int:
        return self.stop - self.start

    def part(self, block: str) -> Tensor:
        """``L`` or ``R`` of this chunk's experts."""
        return select_experts(self.blocks[block], self.experts)

    def half(self, name: str) -> Tensor:
        """``L C`` as ``[experts, iL, jL, iC, jC, b]`` or ``C R`` as ``[experts, a, iC, jC, iR, jR]``."""
        if name not in self.halves:
            dims, central = self.dims, self.blocks["C"]
            if name == "LC":
                built = self.part("L").reshape(-1, dims.a) @ central.reshape(dims.a, -1)
            else:
                rights = self.part("R").reshape(len(self.experts), dims.b, -1)
                built = torch.bmm(repeated(central.reshape(-1, dims.b), len(self.experts)), rights)
            self.halves[name] = built.view(len(self.experts), *axis_sizes(dims, AXES[name]))
        return self.halves[name]

    def matrices(self, step: Step) -> list[Tensor]:
        """An operand for every expert of the chunk, ``[met, new]``."""
        if step.operand in ("L", "R"):
            stacked, experts = self.blocks[step.operand], self.experts
        else:
            stacked, experts = self.half(step.operand), list(range(len(self.experts)))
        size = math.prod(axis_sizes(self.dims, step.met))
        stacked = arrange(stacked, self.dims, AXES[step.operand], step.met + step.new)
        matrices = stacked.reshape(stacked.shape[0], size, -1).unbind(0)
        return [matrices[e] for e in experts]

    def apply(self, step: Step, rows: Tensor, transposed: bool = False) -> Tensor:
        """``rows @ operand``, or with its transpose."""
        if step.operand == "C":
            central = central_matrix(self.blocks["C"], step)
            return rows @ (central.T if transposed else central)
        matrices = self.matrices(step)
        return grouped_mm(rows, [m.T for m in matrices] if transposed else matrices, self.counts)


def central_matrix(central: Tensor, step: Step) -> Tensor:
    """``[met, new]``."""
    axes = step.met + step.new
    arranged = central.permute(*(AXES["C"].index(axis) for axis in axes))
    return arranged.reshape(math.prod(arranged.shape[: len(step.met)]), -1)


def most_slots(dims: BlockDims, strategy: str, itemsize: int) -> int:
    """Slots of a chunk whose states take no more memory than they may; separable's are no larger than its results."""
    if strategy == "separable":
        return sys.maxsize
    widest = max(step.after for step in applications(dims, recipe(dims, strategy)[1]))
    return max(1, STATE_BYTES // (widest * itemsize))


def chunks_of(blocks: dict[str, Tensor], dims: BlockDims, strategy: str, offsets: list[int]) -> Iterator[Chunk]:
    """Consecutive busy experts, as many as the memory for halves and states allows."""
    groups = list(active_groups(offsets))
    most_experts = len(groups)
    merges, _ = recipe(dims, strategy)
    if merges:
        half = math.prod(axis_sizes(dims, AXES[merges[0][0]]))
        most_experts = max(1, int(HALF_SHARE * dims.weight_elements / half))
    slots = most_slots(dims, strategy, blocks["C"].element_size())
    chunk: list[Group] = []
    for group in groups:
        if chunk and (len(chunk) == most_experts or group[2] - chunk[0][1] > slots):
            yield Chunk(blocks, dims, chunk)
            chunk = []
        chunk.append(group)
    if chunk:
        yield Chunk(blocks, dims, chunk)


def first_state(x: Tensor, row_index: Tensor | None, chunk: Chunk) -> Tensor:
    """The chunk's rows, padded to ``iL iC iR`` columns."""
    slots = slice(chunk.start, chunk.stop)
    rows = x[slots] if row_index is None else x.index_select(0, row_index[slots])
    padded = chunk.dims.iL * chunk.dims.iC * chunk.dims.iR
    return rows if padded == rows.shape[1] else torch.nn.functional.pad(rows, (0, padded - rows.shape[1]))


def state_matrix(state: Tensor, dims: BlockDims, step: Step) -> Tensor:
    """``[slots * rest, met]``; a copy where the met axes are not the last."""
    arranged = arrange(state, dims, step.before, step.rest + step.met)
    return arranged.reshape(-1, math.prod(axis_sizes(dims, step.met)))
