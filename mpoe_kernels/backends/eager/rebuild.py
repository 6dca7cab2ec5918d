"""Rebuild strategy: one expert's weight at a time, in slabs that stay in cache, then dense GEMMs.

A slab is a range of ``iL``, so it is a range of the weight's rows. Products of blocks come out in *block order*
``[(iL jL iC jC), (iR jR)]``; one copy of a slab brings them to ``[(iL iC iR), (jL jC jR)]`` and back. Besides inputs
and results at most two experts' weights' worth of memory is alive, whatever E is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpoe_kernels.backends.eager.activation import Upstream
from mpoe_kernels.backends.eager.grouped import (
    Group,
    accumulate_mm,
    accumulator,
    active_groups,
    clear_idle,
    select_experts,
    store,
)
from mpoe_kernels.planner import BlockDims

# A slab in block order and the same slab in the weight's order should stay in a core's cache together.
SLAB_BYTES = 2 << 20
# Half-built weights of several experts share one GEMM as long as they take less than this part of a weight.
CHUNK = 0.75


def in_natural_order(block: Tensor, dims: BlockDims) -> Tensor:
    """A slab in block order -> a view of it as ``[rows iL, iC, iR, jL, jC, jR]``."""
    return block.view(-1, dims.jL, dims.iC, dims.jC, dims.iR, dims.jR).permute(0, 2, 4, 1, 3, 5)


def rebuild_weight(left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> Tensor:
    """One expert's ``[I, F]`` from ``left [iL, jL, a]``, ``central [a, iC, jC, b]``, ``right [b, iR, jR]``."""
    if dims.left_first:
        half = left.reshape(-1, dims.a) @ central.reshape(dims.a, -1)
        full = half.view(-1, dims.b) @ right.reshape(dims.b, -1)
    else:
        half = central.reshape(-1, dims.b) @ right.reshape(dims.b, -1)
        full = left.reshape(-1, dims.a) @ half.view(dims.a, -1)
    del half
    padded = in_natural_order(full, dims).reshape(dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR)
    return padded[: dims.in_features, : dims.out_features]


def block_order(dweight: Tensor, dims: BlockDims) -> Tensor:
    """``[I, F] -> [(iL jL iC jC), (iR jR)]``, the order in which the blocks multiply."""
    padded_in, padded_out = dims.iL * dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
    if (padded_in, padded_out) != (dims.in_features, dims.out_features):
        dweight = torch.nn.functional.pad(dweight, (0, padded_out - dims.out_features, 0, padded_in - dims.in_features))
    ordered = dweight.view(dims.iL, dims.iC, dims.iR, dims.jL, dims.jC, dims.jR).permute(0, 3, 1, 4, 2, 5)
    return ordered.reshape(-1, dims.iR * dims.jR)


def project_gradient(
    ordered: Tensor, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims, need_central: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of one expert's blocks from that of its weight: ``dleft``, ``dcentral`` (or None), ``dright``.

    Args:
        ordered: weight gradient as `block_order` returns it. Right is contracted first, so that the two remaining
            products are small.
    """
    left_matrix, central_matrix = left.reshape(-1, dims.a), central.reshape(dims.a, -1)
    half = (left_matrix @ central_matrix).view(-1, dims.b)
    dright = (half.T @ ordered).view(dims.b, dims.iR, dims.jR)
    del half  # as large as the weight itself at full bonds
    dhalf = (ordered @ right.reshape(dims.b, -1).T).view(dims.iL * dims.jL, -1)  # [(iL jL), (iC jC b)]
    dleft = (dhalf @ central_matrix.T).view(dims.iL, dims.jL, dims.a)
    dcentral = (left_matrix.T @ dhalf).view(central.shape) if need_central else None
    return dleft, dcentral, dright


class _Builder:
    """Blocks as matrices, and how a weight is built from them."""

    def __init__(self, left: Tensor, central: Tensor, right: Tensor, dims: BlockDims) -> None:
        self.dims = dims
        self.same_order = dims.is_separable  # the order of blocks is the weight's own, no copy is needed
        # Right first needs all of ``C R`` for every slab, so it must leave room for the weight and its gradient.
        self.left_first = dims.left_first or dims.a > CHUNK * dims.iL * dims.jL
        experts = left.shape[0]
        self.left = left.reshape(experts, dims.iL * dims.jL, dims.a)
        self.central = central.reshape(dims.a, dims.iC * dims.jC * dims.b)
        self.right = right.reshape(experts, dims.b, dims.iR * dims.jR)
        self.row_elements = dims.weight_elements // dims.iL  # of one iL
        self.in_step, self.padded_out = dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
        self.padded_in = dims.iL * self.in_step
        count = -(-dims.weight_elements * left.element_size() // SLAB_BYTES) if left.is_cpu else 1
        self.slab_rows = -(-dims.iL // min(dims.iL, max(4, count)))
        self.slab_elements = self.slab_rows * self.row_elements
        if self.left_first:
            self.half_elements = dims.iL * dims.jL * dims.iC * dims.jC * dims.b
            self.chunk = max(1, int(CHUNK * dims.weight_elements / self.half_elements))
        else:
            self.half_elements = dims.a * dims.iC * dims.jC * dims.iR * dims.jR
            self.chunk = 1

    def chunks(self, offsets: list[int]) -> Iterator[list[Group]]:
        """Busy experts in groups whose half-built weights are built together."""
        groups = list(active_groups(offsets))
        for first in range(0, len(groups), self.chunk):
            yield groups[first : first + self.chunk]

    def ranges(self, whole: tuple[int, int], rows: int) -> Iterator[tuple[int, int]]:
        """A range of iL in pieces of ``rows``."""
        for first in range(*whole, rows):
            yield first, min(first + rows, whole[1])

    def halves(self, experts: list[int], out: Tensor) -> Tensor:
        """``L C`` of some experts ``[experts, (iL jL), (iC jC b)]``, or ``C R`` of one ``[1, a, (iC jC iR jR)]``."""
        out = out[: len(experts) * self.half_elements]
        if self.left_first:
            lefts = select_experts(self.left, experts).reshape(-1, self.dims.a)
            return torch.mm(lefts, self.central, out=out.view(lefts.shape[0], -1)).view(len(experts), -1, self.dims.b)
        rows = self.central.view(-1, self.dims.b)
        return torch.mm(rows, self.right[experts[0]], out=out.view(rows.shape[0], -1)).view(1, self.dims.a, -1)

    def half_rows(self, half: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first..last`` of iL of an expert's ``L C [(iL jL iC jC), b]``."""
        step = half.shape[0] // self.dims.iL
        return half[first * step : last * step]

    def build(self, expert: int, half: Tensor, whole: tuple[int, int], scratch: Tensor, out: Tensor) -> None:
        """A range of iL of the weight into ``out [rows, (jL jC jR)]``, slab by slab through ``scratch``.

        Where block order is the weight's own, ``scratch`` is not touched.
        """
        dims = self.dims
        for first, last in self.ranges(whole, self.slab_rows):
            result = out[(first - whole[0]) * self.in_step : (last - whole[0]) * self.in_step]
            block = result if self.same_order else scratch[: result.numel()]
            if self.left_first:
                torch.mm(self.half_rows(half, first, last), self.right[expert], out=block.view(-1, dims.iR * dims.jR))
            else:
                rows = slice(first * dims.jL, last * dims.jL)
                torch.mm(self.left[expert, rows], half, out=block.view((last - first) * dims.jL, -1))
            if not self.same_order:
                self.natural(result).copy_(in_natural_order(block, dims))

    def reordered(self, matrix: Tensor, first: int, last: int, scratch: Tensor) -> Tensor:
        """Rows ``first..last`` of iL of ``matrix [.., (jL jC jR)]`` in block order, ``[(iL jL iC jC), (iR jR)]``."""
        slab = matrix[first * self.in_step : last * self.in_step]
        if not self.same_order:
            block = scratch[: slab.numel()]
            in_natural_order(block, self.dims).copy_(self.natural(slab))
            slab = block
        return slab.view(-1, self.dims.iR * self.dims.jR)

    def natural(self, slab: Tensor) -> Tensor:
        """A slab of the weight as ``[rows iL, iC, iR, jL, jC, jR]``."""
        return slab.view(-1, self.dims.iC, self.dims.iR, self.dims.jL, self.dims.jC, self.dims.jR)


def _rows(x: Tensor, row_index: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if row_index is None else x.index_select(0, row_index[start:stop])


def _pad_columns(rows: Tensor, columns: int) -> Tensor:
    return rows if rows.shape[1] == columns else torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def rebuild_forward(
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
) -> Tensor:
    """Pre-activation without bias, ``[N, F]``; rows past the last offset are zero."""
    slots = x.shape[0] if row_index is None else row_index.shape[0]
    z = x.new_empty(slots, dims.out_features)
    builder = _Builder(left, central, right, dims)
    memory, scratch = x.new_empty(dims.weight_elements), x.new_empty(builder.slab_elements)
    weight = memory.view(builder.padded_in, builder.padded_out)
    if builder.left_first and builder.half_elements > CHUNK * dims.weight_elements:
        # At the end of the weight's own memory: no slab of the weight reaches rows of the half that are still needed.
        space = memory[dims.weight_elements - builder.half_elements :]
        builder.same_order = False  # a slab may not be written while it is read
    else:
        space = x.new_empty(builder.chunk * builder.half_elements)
    for chunk in builder.chunks(offsets):
        halves = builder.halves([e for e, _, _ in chunk], space)
        for half, (e, start, stop) in zip(halves, chunk, strict=True):
            builder.build(e, half, (0, dims.iL), scratch, weight)
            rows = _rows(x, row_index, start, stop)
            torch.mm(rows, weight[: dims.in_features, : dims.out_features], out=z[start:stop])
    z[offsets[-1] :] = 0
    return z


class _Gradients:
    """Where a backward pass adds up what it finds; ``None`` where not needed."""

    def __init__(self, builder: _Builder, slots: int, need: tuple[bool, bool, bool, bool]) -> None:
        like = builder.central
        self.x = like.new_empty(slots, builder.padded_in) if need[0] else None
        self.left = torch.empty_like(builder.left, memory_format=torch.contiguous_format) if need[1] else None
        self.central = accumulator(builder.central) if need[2] else None
        self.right = torch.empty_like(builder.right, memory_format=torch.contiguous_format) if need[3] else None
        self.any_block = any(need[1:])


def rebuild_backward(
    upstream: Upstream,
    x: Tensor,
    left: Tensor,
    central: Tensor,
    right: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
    dims: BlockDims,
    need_x: bool,
    need_left: bool,
    need_central: bool,
    need_right: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed.

    The weight is rebuilt again rather than saved; the half it is built from also gives the right gradient. Sums over
    slabs and experts are kept in at least float32.
    """
    builder = _Builder(left, central, right, dims)
    found = _Gradients(builder, upstream.slots, (need_x, need_left, need_central, need_right))
    one_expert = _left_first_gradients if builder.left_first else _right_first_gradients
    one_expert(builder, found, upstream, x, offsets, row_index)
    for stacked in (found.left, found.right):
        if stacked is not None:
            clear_idle(stacked, offsets)
    dx = dcentral = None
    if found.x is not None:
        found.x[offsets[-1] :] = 0
        dx = found.x[:, : dims.in_features]
    if found.central is not None:
        dcentral = found.central.to(central.dtype).view(central.shape)
    dleft = None if found.left is None else found.left.view(left.shape)
    dright = None if found.right is None else found.right.view(right.shape)
    return dx, dleft, dcentral, dright


def _panel_gradient(
    builder: _Builder,
    found: _Gradients,
    grad: Tensor,
    rows: Tensor,
    slots: slice,
    half: tuple[int, Tensor],
    panel: tuple[int, int],
    matrix: Tensor,
    scratch: Tensor,
) -> None:
    """Gradient of the columns of x that a panel of the weight meets; then that of the panel, into ``matrix``.

    Args:
        grad, rows: of the slots ``slots`` of one expert.
        half: the expert and what `_Builder.halves` built for it.
        panel: range of iL.
        matrix: ``[rows, (jL jC jR)]``, memory for the panel as the weight has it.
        scratch: memory for a slab in block order.
    """
    columns = slice(panel[0] * builder.in_step, panel[1] * builder.in_step)
    if found.x is not None:
        builder.build(*half, panel, scratch, matrix)
        torch.mm(grad, matrix.T, out=found.x[slots, columns])
    if found.any_block:
        torch.mm(rows[:, columns].T, grad, out=matrix)


def _left_first_gradients(
    builder: _Builder, found: _Gradients, upstream: Upstream, x: Tensor, offsets: list[int], row_index: Tensor | None
) -> None:
    """Panel by panel; the gradient of an expert's half takes the memory of the half, whose rows are no longer read."""
    dims = builder.dims
    space = x.new_empty(builder.chunk * builder.half_elements)
    # Beside a half as large as the weight there is room for half a weight only.
    count = 1 if builder.half_elements <= CHUNK * dims.weight_elements else 2
    panel_rows = -(-dims.iL // min(count, dims.iL))
    memory = x.new_empty(panel_rows * builder.in_step, builder.padded_out)
    scratch = x.new_empty(builder.slab_elements)
    dright = accumulator(builder.right[0]) if found.right is not None else None
    for chunk in builder.chunks(offsets):
        experts = [e for e, _, _ in chunk]
        halves = builder.halves(experts, space)
        for half, (e, start, stop) in zip(halves, chunk, strict=True):
            rows = _pad_columns(_rows(x, row_index, start, stop), builder.padded_in)
            grad = _pad_columns(upstream.rows(start, stop), builder.padded_out)
            if dright is not None:
                dright.zero_()
            for panel in builder.ranges((0, dims.iL), panel_rows):
                matrix = memory[: (panel[1] - panel[0]) * builder.in_step]
                _panel_gradient(builder, found, grad, rows, slice(start, stop), (e, half), panel, matrix, scratch)
                if not found.any_block:
                    continue
                for first, last in builder.ranges(panel, builder.slab_rows):
                    ordered = builder.reordered(matrix, first - panel[0], last - panel[0], scratch)
                    half_rows = builder.half_rows(half, first, last)
                    if dright is not None:
                        accumulate_mm(dright, half_rows.T, ordered)
                    if found.left is not None or found.central is not None:
                        torch.mm(ordered, builder.right[e].T, out=half_rows)
            if found.right is not None and dright is not None:
                found.right[e] = dright
        dhalves = halves.view(len(chunk) * dims.iL * dims.jL, -1)
        if found.left is not None:
            store(found.left, experts, (dhalves @ builder.central.T).view(len(chunk), -1, dims.a))
        if found.central is not None:
            lefts = select_experts(builder.left, experts).reshape(-1, dims.a)
            accumulate_mm(found.central, lefts.T, dhalves, scratch)


def _right_first_gradients(
    builder: _Builder, found: _Gradients, upstream: Upstream, x: Tensor, offsets: list[int], row_index: Tensor | None
) -> None:
    """The weight's gradient is gathered whole, in block order, where the slabs of the weight were built."""
    dims = builder.dims
    space = x.new_empty(builder.half_elements)
    ordered, memory = x.new_empty(dims.weight_elements), x.new_empty(builder.slab_elements)
    for ((e, start, stop),) in builder.chunks(offsets):
        half = builder.halves([e], space)[0]
        rows = _pad_columns(_rows(x, row_index, start, stop), builder.padded_in)
        grad = _pad_columns(upstream.rows(start, stop), builder.padded_out)
        for first, last in builder.ranges((0, dims.iL), builder.slab_rows):
            block = ordered[first * builder.row_elements : last * builder.row_elements]
            matrix = memory[: block.numel()].view(-1, builder.padded_out)
            _panel_gradient(builder, found, grad, rows, slice(start, stop), (e, half), (first, last), matrix, block)
            if found.any_block:
                in_natural_order(block, dims).copy_(builder.natural(matrix))
        product = ordered.view(dims.iL * dims.jL, -1)
        if found.left is not None:
            torch.mm(product, half.T, out=found.left[e])
        if found.central is not None or found.right is not None:
            torch.mm(builder.left[e].T, product, out=half)
            dhalf = half.view(-1, dims.iR * dims.jR)
            if found.right is not None:
                torch.mm(builder.central.view(-1, dims.b).T, dhalf, out=found.right[e])
            if found.central is not None:
                accumulate_mm(found.central.view(-1, dims.b), dhalf, builder.right[e].T, ordered)
