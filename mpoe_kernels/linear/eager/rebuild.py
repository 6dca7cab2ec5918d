"""Rebuild strategy: one expert's weight at a time, then dense GEMMs.

Besides inputs and results, memory for at most two experts' weights is alive, whatever E is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.eager.activation import Upstream
from mpoe_kernels.linear.eager.row_groups import accumulate_mm, accumulator, clear_idle, select_experts, store
from mpoe_kernels.linear.eager.weight import CHUNK, WeightBuilder, in_natural_order


def _rows(x: Tensor, row_index: Tensor | None, start: int, stop: int) -> Tensor:
    return x[start:stop] if row_index is None else x.index_select(0, row_index[start:stop])


def _pad_columns(rows: Tensor, columns: int) -> Tensor:
    return rows if rows.shape[1] == columns else torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))


def rebuild_forward(call: ForwardCall, offsets: list[int]) -> Tensor:
    """Pre-activation without bias, ``[N, F]``; rows past the last offset are zero."""
    x, row_index, dims = call.x, call.row_index, call.dims
    z = x.new_empty(call.slots, dims.out_features)
    builder = WeightBuilder(*call.blocks, dims)
    memory, scratch = x.new_empty(dims.weight_elements), x.new_empty(builder.slab_elements)
    weight = memory.view(builder.padded_in, builder.padded_out)
    if builder.left_first and builder.half_elements > CHUNK * dims.weight_elements:
        # At the end of the weight's own memory: no slab of the weight overwrites rows of the half that are still
        # needed.
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
    """Accumulators of a backward pass; ``None`` for gradients that are not needed."""

    def __init__(self, builder: WeightBuilder, slots: int, need: tuple[bool, bool, bool, bool]) -> None:
        like = builder.central
        self.x = like.new_empty(slots, builder.padded_in) if need[0] else None
        self.left = torch.empty_like(builder.left, memory_format=torch.contiguous_format) if need[1] else None
        self.central = accumulator(builder.central) if need[2] else None
        self.right = torch.empty_like(builder.right, memory_format=torch.contiguous_format) if need[3] else None
        self.any_block = any(need[1:])


def rebuild_backward(
    call: BackwardCall, upstream: Upstream, offsets: list[int]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of slots ``[N, I]``, left, central, right; ``None`` where not needed.

    The weight is rebuilt rather than saved; the half that it is built from also yields the right gradient. Sums over
    slabs and experts are accumulated in at least float32.
    """
    builder = WeightBuilder(*call.blocks, call.dims)
    found = _Gradients(builder, upstream.slots, call.need_of_plan)
    one_expert = _left_first_gradients if builder.left_first else _right_first_gradients
    one_expert(builder, found, upstream, call.x, offsets, call.row_index)
    for stacked in (found.left, found.right):
        if stacked is not None:
            clear_idle(stacked, offsets)
    dx = dcentral = None
    if found.x is not None:
        found.x[offsets[-1] :] = 0
        dx = found.x[:, : call.in_features]
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
    columns = slice(panel[0] * builder.in_step, panel[1] * builder.in_step)
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
    offsets: list[int],
    row_index: Tensor | None,
) -> None:
    """Panel by panel; the gradient of an expert's half overwrites the half, whose rows are no longer read."""
    dims = builder.dims
    space = x.new_empty(builder.chunk * builder.half_elements)
    # Next to a half as large as the weight there is room only for half a weight.
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
    builder: WeightBuilder,
    found: _Gradients,
    upstream: Upstream,
    x: Tensor,
    offsets: list[int],
    row_index: Tensor | None,
) -> None:
    """The whole gradient of the weight is collected, in block order, in the memory of the weight's slabs."""
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
