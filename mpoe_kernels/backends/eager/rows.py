"""Strategies that send rows through operands: half_left, half_right, chain and separable, in the planner's order.

Only where the axes that an operand meets are not a state's last ones is the state copied; for a separable shape that is
the first state alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.activation import Upstream
from mpoe_kernels.backends.eager.chunks import (
    AXES,
    ROWS_OUT,
    Chunk,
    Step,
    arrange,
    axis_sizes,
    central_matrix,
    chunks_of,
    first_state,
    repeated,
    row_steps,
    state_matrix,
)
from mpoe_kernels.backends.eager.grouped import (
    accumulate_mm,
    accumulator,
    clear_idle,
    grouped_mm,
    grouped_outer,
    store,
)
from mpoe_kernels.planner import BlockDims
from mpoe_kernels.planner.orders import recipe


def rows_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
    strategy: str,
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """``(z [N, F], h)``: pre-activation without bias, zero past the last offset.

    h is what separable saves if asked to, the central step's result ``[N jC, b]``; else ``None``.
    """
    blocks = {"L": left, "C": central, "R": right}
    steps = row_steps(recipe(dims, strategy)[1])
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    width = dims.jL * dims.jC * dims.jR
    if strategy == "separable":
        return _separable_forward(x, blocks, offsets, row_index, dims, steps, save)
    z = x.new_empty(slots, dims.out_features)
    for chunk in chunks_of(blocks, dims, strategy, offsets):
        state = first_state(x, row_index, chunk)
        for step in steps:
            state = chunk.apply(step, state_matrix(state, dims, step))
        result = arrange(state, dims, steps[-1].after, ROWS_OUT)
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
    save: bool,
) -> tuple[Tensor, Tensor | None]:
    """The last state, and what is saved, are written where they belong."""
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    z = x.new_empty(slots * dims.jC, dims.jR)
    h = x.new_empty(slots * dims.jC, dims.b) if save else None
    central = central_matrix(blocks["C"], steps[1])
    for chunk in chunks_of(blocks, dims, "separable", offsets):
        part = slice(chunk.start * dims.jC, chunk.stop * dims.jC)
        middle = chunk.apply(steps[0], state_matrix(first_state(x, row_index, chunk), dims, steps[0]))
        state = x.new_empty(part.stop - part.start, dims.b) if h is None else h[part]
        torch.mm(middle.view(chunk.slots, -1), central, out=state.view(chunk.slots, -1))
        grouped_mm(state, chunk.matrices(steps[2]), chunk.counts, out=z[part])
    for rows in (z, h):
        if rows is not None:
            rows[offsets[-1] * dims.jC :] = 0
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

    def add(self, chunk: Chunk, step: Step, rows: Tensor, grads: Tensor) -> None:
        """Gradient of an operand from the rows that met it and the gradient of their products."""
        dims = self.dims
        if step.operand == "C":
            part = arrange(rows.T @ grads, dims, step.met + step.new, AXES["C"])[0]
            if self.central is None:
                self.central = part.contiguous()
            else:
                self.total(part).add_(part)
            return
        experts, axes = chunk.experts, AXES[step.operand]
        if step.operand in ("L", "R"):
            stacked = self.aux[step.operand]
        else:
            stacked, experts = grads.new_empty(len(experts), *axis_sizes(dims, axes)), list(range(len(experts)))
        targets = arrange(stacked, dims, axes, step.met + step.new).unbind(0)
        grouped_outer(rows, grads, chunk.counts, [targets[e] for e in experts])
        if step.operand not in ("L", "R"):
            self.split(chunk, step.operand, stacked)

    def split(self, chunk: Chunk, name: str, gradient: Tensor) -> None:
        """Gradients of the two blocks that a half-built weight ``[experts, axes...]`` is made of."""
        dims, central, count = self.dims, chunk.blocks["C"], len(chunk.experts)
        if name == "LC":
            grads = gradient.reshape(count * dims.iL * dims.jL, -1)
            if "L" in self.aux:
                dleft = grads @ central.reshape(dims.a, -1).T
                store(self.aux["L"], chunk.experts, dleft.view(count, *axis_sizes(dims, AXES["L"])))
            if self.need_central:
                lefts = chunk.part("L").reshape(-1, dims.a)
                accumulate_mm(self.total(central).view(dims.a, -1), lefts.T, grads)
            return
        stacked = gradient.reshape(count, -1, dims.iR * dims.jR)
        if "R" in self.aux:
            dright = torch.bmm(repeated(central.reshape(-1, dims.b).T, count), stacked)
            store(self.aux["R"], chunk.experts, dright.view(count, *axis_sizes(dims, AXES["R"])))
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
    steps = row_steps(recipe(dims, strategy)[1])
    found = _Found(blocks, upstream.slots, dims, need)
    for chunk in chunks_of(blocks, dims, strategy, offsets):
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
    chunk: Chunk,
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
    state = first_state(x, row_index, chunk) if last >= 0 else x.new_empty(0)
    for k in range(last + 1):
        matrix = state_matrix(state, dims, steps[k])
        if wanted[k]:
            inputs[k] = matrix
        if k < last:
            state = chunk.apply(steps[k], matrix)
    slots = slice(chunk.start, chunk.stop)
    width = dims.jL * dims.jC * dims.jR
    rows = upstream.rows(chunk.start, chunk.stop)
    if width != dims.out_features:
        rows = torch.nn.functional.pad(rows, (0, width - dims.out_features))
    state = arrange(rows, dims, ROWS_OUT, steps[-1].after)
    for k in reversed(range(count)):
        step = steps[k]
        grads = state.reshape(-1, math.prod(axis_sizes(dims, step.new)))
        matrix_k = inputs[k]
        if matrix_k is not None:
            found.add(chunk, step, matrix_k, grads)
            inputs[k] = None
        if not before_needed[k]:
            return
        state = arrange(chunk.apply(step, grads, transposed=True), dims, step.rest + step.met, step.before)
    if found.x is not None:
        found.x[slots].view(state.shape).copy_(state)
