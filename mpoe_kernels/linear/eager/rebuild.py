"""Rebuild strategy: one expert's weight at a time, built from its blocks in slabs that stay in cache; dense GEMMs.

Besides inputs and results, memory for at most two experts' weights is alive, whatever E is. A slab is a range of
``iL``, so it is a range of the weight's rows. Products of blocks are in *block order* ``[(iL jL iC jC), (iR jR)]``; one
copy of a slab converts them to ``[(iL iC iR), (jL jC jR)]`` or back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.contract import BlockDims
from mpoe_kernels.linear.eager.rows import accumulate_mm, accumulator

if TYPE_CHECKING:
    from mpoe_kernels.linear.eager import BlockGradients, Group, Upstream
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

# A slab in block order and the same slab in the weight's order should fit in a core's cache together.
SLAB_BYTES = 2 << 20
# Half-built weights of several experts share one GEMM if they take less than this fraction of a weight.
CHUNK = 0.75


def _rows(x: Tensor, row_index: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if row_index is None else x.index_select(0, row_index[start:stop])


def _pad_columns(rows: Tensor, columns: int) -> Tensor:
    return rows if rows.shape[1] == columns else torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def rebuild_forward(call: ForwardCall, groups: list[Group]) -> Tensor:
    """Pre-activation without bias, ``[N, F]``; undefined in slots without an expert."""
    x, row_index, dims = call.x, call.row_index, call.dims
    z = x.new_empty(call.slots, dims.out_features)
    builder = WeightBuilder(call)
    memory, scratch = x.new_empty(builder.layout.weight_elements), x.new_empty(builder.layout.slab_elements)
    weight = memory.view(builder.layout.padded_in, builder.layout.padded_out)
    if builder.layout.left_first and builder.layout.half_elements > CHUNK * builder.layout.weight_elements:
        # At the end of the weight's own memory: no slab of the weight overwrites rows of the half that are still
        # needed.
        space = memory[builder.layout.weight_elements - builder.layout.half_elements :]
        builder.same_order = False  # a slab may not be written while it is read
    else:
        space = x.new_empty(builder.layout.chunk * builder.layout.half_elements)
    for chunk in builder.chunks(groups):
        halves = builder.halves(chunk, space)
        for half, (e, start, stop) in zip(halves, chunk, strict=True):
            builder.build(e, half, (0, dims.iL), scratch, weight)
            rows = _rows(x, row_index, start, stop)
            torch.mm(rows, weight[: dims.in_features, : dims.out_features], out=z[start:stop])
    return z


class _Gradients:
    """Accumulators of a backward pass; ``None`` for gradients that are not needed."""

    def __init__(self, builder: WeightBuilder, slots: int, need: tuple[bool, bool, bool, bool]) -> None:
        like = builder.central
        self.x = like.new_empty(slots, builder.layout.padded_in) if need[0] else None
        self.left = torch.empty_like(builder.left, memory_format=torch.contiguous_format) if need[1] else None
        self.central = accumulator(builder.central) if need[2] else None
        self.right = torch.empty_like(builder.right, memory_format=torch.contiguous_format) if need[3] else None
        self.any_block = any(need[1:])


def rebuild_backward(call: BackwardCall, upstream: Upstream, groups: list[Group]) -> BlockGradients:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed, undefined where no expert is.

    The weight is rebuilt rather than saved; the half that it is built from also yields the right gradient. Sums over
    slabs and experts are accumulated in at least float32.
    """
    builder = WeightBuilder(call)
    found = _Gradients(builder, call.slots, call.need_of_plan)
    one_expert = _left_first_gradients if builder.layout.left_first else _right_first_gradients
    one_expert(builder, found, upstream, call.x, groups, call.row_index)
    dx = None if found.x is None else found.x[:, : call.in_features]
    dcentral = None
    if found.central is not None:
        dcentral = found.central.to(call.central.dtype).view(call.central.shape)
    dleft = None if found.left is None else found.left.view(call.left.shape)
    dright = None if found.right is None else found.right.view(call.right.shape)
    return dx, dleft, dcentral, dright


def _panel_gradient(
    builder: WeightBuilder,
    found: _Gradients,
    grad: Tensor,
    rows: Tensor,
    slots: slice,
    half: tuple[int, Tensor],
    panel: tuple[int, int],
    matrix: Tensor,
    scratch: Tensor,
) -> None:
    """Gradient of the columns of x that a panel of the weight multiplies; then that of the panel, into ``matrix``.

    Args: grad, rows: those of the slots ``slots`` of one expert. half: the expert and the result of
        `WeightBuilder.halves` for it. panel: range of iL. matrix: ``[rows, (jL jC jR)]``, memory for the panel in the
        weight's order. scratch: memory for a slab in block order.
    """
    columns = slice(panel[0] * builder.layout.in_step, panel[1] * builder.layout.in_step)
    if found.x is not None:
        builder.build(*half, panel, scratch, matrix)
        torch.mm(grad, matrix.T, out=found.x[slots, columns])
    if found.any_block:
        torch.mm(rows[:, columns].T, grad, out=matrix)


def _left_first_gradients(
    builder: WeightBuilder,
    found: _Gradients,
    upstream: Upstream,
    x: Tensor,
    groups: list[Group],
    row_index: Tensor | None,
) -> None:
    """Panel by panel; the gradient of an expert's half overwrites the half, whose rows are no longer read."""
    dims = builder.dims
    space = x.new_empty(builder.layout.chunk * builder.layout.half_elements)
    # Next to a half as large as the weight there is room only for half a weight.
    count = 1 if builder.layout.half_elements <= CHUNK * builder.layout.weight_elements else 2
    panel_rows = -(-dims.iL // min(count, dims.iL))
    memory = x.new_empty(panel_rows * builder.layout.in_step, builder.layout.padded_out)
    scratch = x.new_empty(builder.layout.slab_elements)
    dright = accumulator(builder.right[0]) if found.right is not None else None
    for chunk in builder.chunks(groups):
        experts = slice(chunk[0][0], chunk[-1][0] + 1)
        halves = builder.halves(chunk, space)
        for half, (e, start, stop) in zip(halves, chunk, strict=True):
            rows = _pad_columns(_rows(x, row_index, start, stop), builder.layout.padded_in)
            grad = _pad_columns(upstream.rows(start, stop), builder.layout.padded_out)
            if dright is not None:
                dright.zero_()
            for panel in builder.ranges((0, dims.iL), panel_rows):
                matrix = memory[: (panel[1] - panel[0]) * builder.layout.in_step]
                _panel_gradient(builder, found, grad, rows, slice(start, stop), (e, half), panel, matrix, scratch)
                if not found.any_block:
                    continue
                for first, last in builder.ranges(panel, builder.layout.slab_rows):
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
            found.left[experts] = (dhalves @ builder.central.T).view(len(chunk), -1, dims.a)
        if found.central is not None:
            lefts = builder.left[experts].reshape(-1, dims.a)
            accumulate_mm(found.central, lefts.T, dhalves, scratch)


def _right_first_gradients(
    builder: WeightBuilder,
    found: _Gradients,
    upstream: Upstream,
    x: Tensor,
    groups: list[Group],
    row_index: Tensor | None,
) -> None:
    """The whole gradient of the weight is collected, in block order, in the memory of the weight's slabs."""
    dims = builder.dims
    space = x.new_empty(builder.layout.half_elements)
    ordered, memory = x.new_empty(builder.layout.weight_elements), x.new_empty(builder.layout.slab_elements)
    for e, start, stop in groups:
        half = builder.halves([(e, start, stop)], space)[0]
        rows = _pad_columns(_rows(x, row_index, start, stop), builder.layout.padded_in)
        grad = _pad_columns(upstream.rows(start, stop), builder.layout.padded_out)
        for first, last in builder.ranges((0, dims.iL), builder.layout.slab_rows):
            block = ordered[first * builder.layout.row_elements : last * builder.layout.row_elements]
            matrix = memory[: block.numel()].view(-1, builder.layout.padded_out)
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


def in_natural_order(block: Tensor, dims: BlockDims) -> Tensor:
    """A slab in block order -> a view of it as ``[rows iL, iC, iR, jL, jC, jR]``."""
    return block.view(-1, dims.jL, dims.iC, dims.jC, dims.iR, dims.jR).permute(0, 2, 4, 1, 3, 5)


class Layout:
    """Sizes of a weight that is built in slabs, and of the half that it is built from.

    Attributes:
        left_first: whether that half is ``L C``. Right first needs all of ``C R`` for every slab, so it must leave room
            for the weight and its gradient.
        is_natural: the order of blocks is the weight's own, no copy is needed.
        weight_elements, row_elements, slab_elements, half_elements: of the weight, one iL of it, a slab, a half.
        in_step: rows of the weight of one iL.
        padded_in, padded_out: rows and columns of the weight.
        slab_rows: iL of a slab.
        chunk: experts whose halves are built together.
    """

    def __init__(self, dims: BlockDims, itemsize: int, on_cpu: bool) -> None:
        self.is_natural, self.weight_elements = dims.is_separable, dims.weight_elements
        self.left_first = dims.left_first or dims.a > CHUNK * dims.iL * dims.jL
        self.row_elements = self.weight_elements // dims.iL
        self.in_step, self.padded_out = dims.iC * dims.iR, dims.jL * dims.jC * dims.jR
        self.padded_in = dims.iL * self.in_step
        count = -(-self.weight_elements * itemsize // SLAB_BYTES) if on_cpu else 1
        self.slab_rows = -(-dims.iL // min(dims.iL, max(4, count)))
        self.slab_elements = self.slab_rows * self.row_elements
        if self.left_first:
            self.half_elements = dims.iL * dims.jL * dims.iC * dims.jC * dims.b
            self.chunk = max(1, int(CHUNK * self.weight_elements / self.half_elements))
        else:
            self.half_elements = dims.a * dims.iC * dims.jC * dims.iR * dims.jR
            self.chunk = 1


_layout = lru_cache(maxsize=1024)(Layout)


class WeightBuilder:
    """Builds weights from blocks as matrices."""

    def __init__(self, call: LinearCall) -> None:
        self.dims = dims = call.dims
        self.layout = _layout(dims, call.central.element_size(), call.central.is_cpu)
        self.same_order = self.layout.is_natural
        experts = call.left.shape[0]
        self.left = call.left.reshape(experts, dims.iL * dims.jL, dims.a)
        self.central = call.central.reshape(dims.a, dims.iC * dims.jC * dims.b)
        self.right = call.right.reshape(experts, dims.b, dims.iR * dims.jR)

    def chunks(self, groups: list[Group]) -> Iterator[list[Group]]:
        """Experts without a gap between them, whose half-built weights are built together."""
        chunk: list[Group] = []
        for group in groups:
            if chunk and (len(chunk) == self.layout.chunk or group[0] != chunk[-1][0] + 1):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def ranges(self, whole: tuple[int, int], rows: int) -> Iterator[tuple[int, int]]:
        """A range of iL in pieces of ``rows``."""
        for first in range(*whole, rows):
            yield first, min(first + rows, whole[1])

    def halves(self, chunk: list[Group], out: Tensor) -> Tensor:
        """``L C`` of a chunk's experts ``[n, (iL jL), (iC jC b)]``, or ``C R`` of one ``[1, a, (iC jC iR jR)]``."""
        first, count = chunk[0][0], len(chunk)
        out = out[: count * self.layout.half_elements]
        if self.layout.left_first:
            lefts = self.left[first : first + count].reshape(-1, self.dims.a)
            return torch.mm(lefts, self.central, out=out.view(lefts.shape[0], -1)).view(count, -1, self.dims.b)
        rows = self.central.view(-1, self.dims.b)
        return torch.mm(rows, self.right[first], out=out.view(rows.shape[0], -1)).view(1, self.dims.a, -1)

    def half_rows(self, half: Tensor, first: int, last: int) -> Tensor:
        """Rows ``first..last`` of iL of an expert's ``L C [(iL jL iC jC), b]``."""
        step = half.shape[0] // self.dims.iL
        return half[first * step : last * step]

    def build(self, expert: int, half: Tensor, whole: tuple[int, int], scratch: Tensor, out: Tensor) -> None:
        """A range of iL of the weight into ``out [rows, (jL jC jR)]``, slab by slab through ``scratch``.

        If block order is the weight's own, ``scratch`` is not used.
        """
        dims = self.dims
        for first, last in self.ranges(whole, self.layout.slab_rows):
            result = out[(first - whole[0]) * self.layout.in_step : (last - whole[0]) * self.layout.in_step]
            block = result if self.same_order else scratch[: result.numel()]
            if self.layout.left_first:
                torch.mm(self.half_rows(half, first, last), self.right[expert], out=block.view(-1, dims.iR * dims.jR))
            else:
                rows = slice(first * dims.jL, last * dims.jL)
                torch.mm(self.left[expert, rows], half, out=block.view((last - first) * dims.jL, -1))
            if not self.same_order:
                self.natural(result).copy_(in_natural_order(block, dims))

    def reordered(self, matrix: Tensor, first: int, last: int, scratch: Tensor) -> Tensor:
        """Rows ``first..last`` of iL of ``matrix [.., (jL jC jR)]`` in block order, ``[(iL jL iC jC), (iR jR)]``."""
        slab = matrix[first * self.layout.in_step : last * self.layout.in_step]
        if not self.same_order:
            block = scratch[: slab.numel()]
            in_natural_order(block, self.dims).copy_(self.natural(slab))
            slab = block
        return slab.view(-1, self.dims.iR * self.dims.jR)

    def natural(self, slab: Tensor) -> Tensor:
        """A slab of the weight as ``[rows iL, iC, iR, jL, jC, jR]``."""
        return slab.view(-1, self.dims.iC, self.dims.iR, self.dims.jL, self.dims.jC, self.dims.jR)
