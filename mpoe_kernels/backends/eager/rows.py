"""Strategies that send rows through operands: half_left, half_right, chain and separable, in the planner's order.

A state of the rows is a tensor ``[slots, axes...]``. An operand (L, C, R, or a half-built weight LC or CR) contracts
the axes it shares with the state (``met``) and puts its others (``new``) behind what remains (``rest``): one GEMM with
``K = met``, grouped by expert, or for C, which the experts share, over all slots at once. Only where the met axes are
not the last ones is the state copied; for a separable shape that is the first state alone. Slots are taken in chunks of
whole experts, so that half-built weights stay below two weights' memory and states stay small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.activation import Upstream
from mpoe_kernels.backends.eager.grouped import (
    Group,
    accumulate_mm,
    accumulator,
    active_groups,
    clear_idle,
    grouped_mm,
    grouped_outer,
    select_experts,
    store,
)
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.orders import applications, program

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


def _sizes(dims: BlockDims, axes: tuple[str, ...]) -> list[int]:
    return [getattr(dims, axis) for axis in axes]


def _arrange(t: Tensor, dims: BlockDims, before: tuple[str, ...], after: tuple[str, ...]) -> Tensor:
    """``[n, before...] -> [n, after...]``, a view; ``t`` has any shape with that many elements."""
    named = t.reshape(-1, *_sizes(dims, before))
    return named.permute(0, *(1 + before.index(axis) for axis in after))


def _repeated(matrix: Tensor, times: int) -> Tensor:
    """For `torch.bmm`, whose way of computing, unlike `torch.matmul`'s, never depends on ``requires_grad``."""
    return matrix.expand(times, *matrix.shape)


class _Chunk:
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
                built = torch.bmm(_repeated(central.reshape(-1, dims.b), len(self.experts)), rights)
            self.halves[name] = built.view(len(self.experts), *_sizes(dims, AXES[name]))
        return self.halves[name]

    def matrices(self, step: Step) -> list[Tensor]:
        """An operand for every expert of the chunk, ``[met, new]``."""
        if step.operand in ("L", "R"):
            stacked, experts = self.blocks[step.operand], self.experts
        else:
            stacked, experts = self.half(step.operand), list(range(len(self.experts)))
        size = math.prod(_sizes(self.dims, step.met))
        stacked = _arrange(stacked, self.dims, AXES[step.operand], step.met + step.new)
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


def _chunks(blocks: dict[str, Tensor], dims: BlockDims, strategy: str, offsets: list[int]) -> Iterator[_Chunk]:
    """Consecutive busy experts, as many as the memory for halves and states allows."""
    groups = list(active_groups(offsets))
    most_experts, most_slots = len(groups), offsets[-1]
    merges, order = program(dims, strategy)
    if merges:
        half = math.prod(_sizes(dims, AXES[merges[0][0]]))
        most_experts = max(1, int(HALF_SHARE * dims.weight_elements / half))
    if strategy != "separable":
        widest = max(step.after for step in applications(dims, order))
        most_slots = max(1, STATE_BYTES // (widest * blocks["C"].element_size()))
    chunk: list[Group] = []
    for group in groups:
        if chunk and (len(chunk) == most_experts or group[2] - chunk[0][1] > most_slots):
            yield _Chunk(blocks, dims, chunk)
            chunk = []
        chunk.append(group)
    if chunk:
        yield _Chunk(blocks, dims, chunk)


def _first_state(x: Tensor, row_index: Tensor | None, chunk: _Chunk) -> Tensor:
    """The chunk's rows, padded to ``iL iC iR`` columns."""
    slots = slice(chunk.start, chunk.stop)
    rows = x[slots] if row_index is None else x.index_select(0, row_index[slots])
    padded = chunk.dims.iL * chunk.dims.iC * chunk.dims.iR
    return rows if padded == rows.shape[1] else torch.nn.functional.pad(rows, (0, padded - rows.shape[1]))


def _matrix(state: Tensor, dims: BlockDims, step: Step) -> Tensor:
    """``[slots * rest, met]``; a copy where the met axes are not the last."""
    arranged = _arrange(state, dims, step.before, step.rest + step.met)
    return arranged.reshape(-1, math.prod(_sizes(dims, step.met)))


def rows_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
    strategy: str,
) -> tuple[Tensor, Tensor | None]:
    """``(z [N, F], h)``: pre-activation without bias, zero past the last offset; h is what separable saves, else None.

    h is the central step's result ``[N jC, b]``.
    """
    blocks = {"L": left, "C": central, "R": right}
    steps = row_steps(program(dims, strategy)[1])
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    width = dims.jL * dims.jC * dims.jR
    if strategy == "separable":
        return _separable_forward(x, blocks, offsets, row_index, dims, steps)
    z = x.new_empty(slots, dims.out_features)
    for chunk in _chunks(blocks, dims, strategy, offsets):
        state = _first_state(x, row_index, chunk)
        for step in steps:
            state = chunk.apply(step, _matrix(state, dims, step))
        result = _arrange(state, dims, steps[-1].after, ROWS_OUT)
        target = z[chunk.start : chunk.stop]
        if width == dims.out_features:
            target.view(result.shape).copy_(result)
        else:
            target.copy_(result.reshape(-1, width)[:, : dims.out_features])
    z[offsets[-1] :] = 0
    return z, None


def _separable_forward(
    x: Tensor,
    blocks: dict[str, Tensor],
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
    steps: tuple[Step, ...],
) -> tuple[Tensor, Tensor]:
    """One chunk of all slots, the last states written where they belong."""
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    h = x.new_empty(slots * dims.jC, dims.b)
    z = x.new_empty(slots * dims.jC, dims.jR)
    last = offsets[-1]
    for chunk in _chunks(blocks, dims, "separable", offsets):
        middle = chunk.apply(steps[0], _matrix(_first_state(x, row_index, chunk), dims, steps[0]))
        torch.mm(middle.view(last, -1), central_matrix(blocks["C"], steps[1]), out=h[: last * dims.jC].view(last, -1))
        grouped_mm(h[: last * dims.jC], chunk.matrices(steps[2]), chunk.counts, out=z[: last * dims.jC])
    h[last * dims.jC :] = 0
    z[last * dims.jC :] = 0
    return z.view(slots, dims.jC * dims.jR)[:, : dims.out_features], h


class _Found:
    """Gradients as they are collected; ``None`` where not needed."""

    def __init__(
        self, blocks: dict[str, Tensor], slots: int, dims: BlockDims, need: tuple[bool, bool, bool, bool]
    ) -> None:
        central = blocks["C"]
        self.dims = dims
        self.x = central.new_empty(slots, dims.iL * dims.iC * dims.iR) if need[0] else None
        self.aux = {k: central.new_empty(blocks[k].shape) for k, needed in (("L", need[1]), ("R", need[3])) if needed}
        self.need_central = need[2]
        self.central: Tensor | None = None  # once there are several parts, their sum in at least float32
        self.blocks = set(self.aux) | ({"C"} if need[2] else set())

    def total(self, like: Tensor) -> Tensor:
        """What was found for the central block, ready to be added to."""
        if self.central is None:
            self.central = accumulator(like)
        self.central = self.central.to(torch.promote_types(like.dtype, torch.float32))
        return self.central

    def add(self, chunk: _Chunk, step: Step, rows: Tensor, grads: Tensor) -> None:
        """Gradient of an operand from the rows that met it and the gradient of their products."""
        dims = self.dims
        if step.operand == "C":
            part = _arrange(rows.T @ grads, dims, step.met + step.new, AXES["C"])[0]
            if self.central is None:
                self.central = part.contiguous()
            else:
                self.total(part).add_(part)
            return
        product = grouped_outer(rows, grads, chunk.counts)
        natural = _arrange(product, dims, step.met + step.new, AXES[step.operand])
        if step.operand in ("L", "R"):
            store(self.aux[step.operand], chunk.experts, natural)
        else:
            self.split(chunk, step.operand, natural)

    def split(self, chunk: _Chunk, name: str, gradient: Tensor) -> None:
        """Gradients of the two blocks that a half-built weight ``[experts, axes...]`` is made of."""
        dims, central, count = self.dims, chunk.blocks["C"], len(chunk.experts)
        if name == "LC":
            grads = gradient.reshape(count * dims.iL * dims.jL, -1)
            if "L" in self.aux:
                dleft = grads @ central.reshape(dims.a, -1).T
                store(self.aux["L"], chunk.experts, dleft.view(count, *_sizes(dims, AXES["L"])))
            if self.need_central:
                lefts = chunk.part("L").reshape(-1, dims.a)
                accumulate_mm(self.total(central).view(dims.a, -1), lefts.T, grads)
            return
        stacked = gradient.reshape(count, -1, dims.iR * dims.jR)
        if "R" in self.aux:
            dright = torch.bmm(_repeated(central.reshape(-1, dims.b).T, count), stacked)
            store(self.aux["R"], chunk.experts, dright.view(count, *_sizes(dims, AXES["R"])))
        if self.need_central:
            total = self.total(central).view(-1, dims.b)
            for right, grads in zip(chunk.part("R"), stacked, strict=True):
                accumulate_mm(total, grads, right.reshape(dims.b, -1).T)


def rows_backward(
    upstream: Upstream,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    h: Tensor | None,
    dims: BlockDims,
    strategy: str,
    need: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed.

    Args:
        h: what the forward pass of separable saved; other states are computed again, as far as they are read.
    """
    blocks = {"L": left, "C": central, "R": right}
    steps = row_steps(program(dims, strategy)[1])
    found = _Found(blocks, upstream.slots, dims, need)
    for chunk in _chunks(blocks, dims, strategy, offsets):
        _chunk_backward(found, chunk, steps, upstream, x, row_index, h)
    for stacked in found.aux.values():
        clear_idle(stacked, offsets)
    dx = None
    if found.x is not None:
        found.x[offsets[-1] :] = 0
        dx = found.x[:, : dims.in_features]
    dcentral = None
    if need[2]:
        dcentral = torch.zeros_like(central) if found.central is None else found.central.to(central.dtype)
    return dx, found.aux.get("L"), dcentral, found.aux.get("R")


def _chunk_backward(
    found: _Found,
    chunk: _Chunk,
    steps: tuple[Step, ...],
    upstream: Upstream,
    x: Tensor,
    row_index: Tensor | None,
    h: Tensor | None,
) -> None:
    dims, count = chunk.dims, len(steps)
    wanted = [bool(found.blocks & set(step.operand)) for step in steps]
    # Whether the gradient of the state before a step leads to something.
    before_needed = [found.x is not None or any(wanted[:k]) for k in range(count)]
    inputs: list[Tensor | None] = [None] * count  # the matrices that met the operands, as far as they are read
    if h is not None and wanted[2]:
        inputs[2] = h[chunk.start * dims.jC : chunk.stop * dims.jC]
    last = max((k for k in range(count) if wanted[k] and inputs[k] is None), default=-1)
    state = _first_state(x, row_index, chunk) if last >= 0 else x.new_empty(0)
    for k in range(last + 1):
        matrix = _matrix(state, dims, steps[k])
        if wanted[k]:
            inputs[k] = matrix
        if k < last:
            state = chunk.apply(steps[k], matrix)
    slots = slice(chunk.start, chunk.stop)
    width = dims.jL * dims.jC * dims.jR
    rows = upstream.rows(chunk.start, chunk.stop)
    if width != dims.out_features:
        rows = torch.nn.functional.pad(rows, (0, width - dims.out_features))
    state = _arrange(rows, dims, ROWS_OUT, steps[-1].after)
    for k in reversed(range(count)):
        step = steps[k]
        grads = state.reshape(-1, math.prod(_sizes(dims, step.new)))
        matrix_k = inputs[k]
        if matrix_k is not None:
            found.add(chunk, step, matrix_k, grads)
            inputs[k] = None
        if not before_needed[k]:
            return
        state = _arrange(chunk.apply(step, grads, transposed=True), dims, step.rest + step.met, step.before)
    if found.x is not None:
        found.x[slots].view(state.shape).copy_(state)
