"""Strategies that multiply rows by operands (half_left, half_right, chain, separable): the three
products in PyTorch.

Slots are processed in chunks of whole experts, so that half-built weights stay below two weights'
memory and rows between operands stay small. A tensor is copied only if the axes that a GEMM
contracts are not its last ones; for a separable shape, only the first rows.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.contract.orders import INDICES, SEPARABLE_ORDER, BlockDims, applications
from mpoe_kernels.contract.program import Product, Program

if TYPE_CHECKING:
    from mpoe_kernels.linear.eager import Group, Upstream
    from mpoe_kernels.linear.op import LinearCall

# Half-built weights of a chunk of experts: at most this fraction of a weight. They exist up to
# twice (the rows may need another layout than the one they are built in), and so do their
# gradients.
HALF_SHARE = 0.5
# Rows between operands of a chunk of experts (one expert's may be larger): about the size of a
# last-level cache.
STATE_BYTES = 32 << 20


@dataclass
class Pass:
    """Tensors of a whole call.

    Attributes:
        program: the program.
        call: the call.
        upstream: gradient of y, by slots.
        rows: rows of the whole call, by name, with their axes in memory: inputs and outputs.
        aux: memory for ``d L`` and ``d R`` of all experts.
        central: the central gradient; once there are several parts, their sum in at least float32.
    """

    program: Program
    call: LinearCall
    upstream: Upstream | None = None
    rows: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, Tensor] = field(default_factory=dict)
    central: Tensor | None = None

    @property
    def dims(self) -> BlockDims:
        """Sizes of the blocks."""
        return self.call.dims

    @property
    def blocks(self) -> dict[str, Tensor]:
        """L and R ``[E, axes...]``, C ``[axes...]``."""
        return {"L": self.call.left, "C": self.call.central, "R": self.call.right}

    def add_central(self, part: Tensor) -> None:
        """Add a part ``[a, iC, jC, b]`` of the central gradient."""
        if self.central is None:
            self.central = part.contiguous()
        else:
            self.central_sum().add_(part)

    def central_sum(self) -> Tensor:
        """The central gradient so far, ready for accumulation."""
        like = self.blocks["C"]
        if self.central is None:
            self.central = accumulator(like)
        self.central = self.central.to(torch.promote_types(like.dtype, torch.float32))
        return self.central

    def chunks(self, groups: list[Group]) -> Iterator[EagerChunk]:
        """Consecutive busy experts, as many as the memory bounds for halves and rows allow."""
        most_experts, most_slots = most_at_once(
            self.dims, self.program.built, self.program.order, self.call.x.element_size()
        )
        chunk: list[Group] = []
        for group in groups:
            if chunk and (len(chunk) == most_experts or group[2] - chunk[0][1] > most_slots):
                yield EagerChunk(self, chunk)
                chunk = []
            chunk.append(group)
        if chunk:
            yield EagerChunk(self, chunk)


@lru_cache(maxsize=1024)
def most_at_once(
    dims: BlockDims, built: tuple[str, ...], order: tuple[str, ...], itemsize: int
) -> tuple[int, int]:
    """Experts and slots of a chunk, within the memory bounds for half-built weights and for rows;
    separable's rows are no larger than its results."""
    largest = max((dims.elements(INDICES[name]) for name in built), default=0)
    experts = max(1, int(HALF_SHARE * dims.weight_elements / largest)) if largest else sys.maxsize
    if dims.is_separable and order == SEPARABLE_ORDER:
        return experts, sys.maxsize
    widest = max(step.after for step in applications(dims, order))
    return experts, max(1, STATE_BYTES // (widest * itemsize))


class EagerChunk:
    """The products for some consecutive busy experts; see `run`."""

    def __init__(self, whole: Pass, groups: list[Group]) -> None:
        self.whole, self.dims = whole, whole.dims
        self.start, self.stop = groups[0][1], groups[-1][2]
        self.experts = [e for e, _, _ in groups]
        self.counts = [stop - start for _, start, stop in groups]

    def given(self, name: str) -> Named:
        axes = self.whole.program.axes[name]
        if name == "C":
            return Named(self.whole.blocks["C"].unsqueeze(0), axes)
        if name in ("L", "R"):
            return Named(self.whole.blocks[name], axes, self.experts)
        if name == "x":
            x, index, slots = (
                self.whole.call.x,
                self.whole.call.row_index,
                slice(self.start, self.stop),
            )
            rows = x[slots] if index is None else x.index_select(0, index[slots])
        elif name == "d y" and self.whole.upstream is not None:
            rows = self.whole.upstream.rows(self.start, self.stop)
        else:
            rows = self._target(name)
        sizes = _sizes(self.dims, axes)
        if rows.shape[1] != math.prod(sizes):
            rows = torch.nn.functional.pad(rows, (0, math.prod(sizes) - rows.shape[1]))
        return Named(rows.view(-1, *sizes), axes)

    def _target(self, name: str) -> Tensor:
        return self.whole.rows[name][self.start : self.stop]

    def rows(self, product: Product, rows: Named, operand: Named) -> Named:
        kept, met = _split(rows.axes, operand.axes)
        # In the program's order, which is the one that the next product needs.
        new = _split(self.whole.program.axes[product.result], operand.axes)[1]
        matrix = rows.matrix(kept, met)
        factors = operand.each(met, new)
        axes = (*kept, *new)
        out = self._direct(product.result, axes)
        shape = (matrix.shape[0], factors[0].shape[1])
        product_rows = matrix.new_empty(shape) if out is None else out.view(shape)
        if product.second == "C":
            torch.mm(matrix, factors[0], out=product_rows)
        else:
            grouped_mm(matrix, factors, self.counts, out=product_rows)
        found = Named(product_rows.view(-1, *_sizes(self.dims, axes)), axes)
        if out is None and product.result in self.whole.rows:
            self._copy(product.result, found)
        return found

    def _direct(self, name: str, axes: tuple[str, ...]) -> Tensor | None:
        """Where rows with these axes can be written directly: the call's memory, or new memory if
        None."""
        if name not in self.whole.rows or _wide(self.dims, axes) != _wide(
            self.dims, self.whole.program.axes[name]
        ):
            return None
        target = self._target(name)
        return (
            target
            if target.shape[1] == math.prod(_sizes(self.dims, axes)) and target.is_contiguous()
            else None
        )

    def _copy(self, name: str, found: Named) -> None:
        target, result = self._target(name), found.arranged(self.whole.program.axes[name])
        if target.shape[1] == math.prod(result.shape[1:]):
            target.view(result.shape).copy_(result)
        else:  # crop what pads the true columns
            target.copy_(result.reshape(result.shape[0], -1)[:, : target.shape[1]])

    def gradient(self, product: Product, rows: Named, grads: Named) -> Named:
        axes = self.whole.program.axes[product.result]
        shared, m = _split(rows.axes, axes)
        n = _split(grads.axes, axes)[1]
        if (
            product.result == "d C"
        ):  # fewer rows than the block has elements are quicker to rearrange
            inside, outside = _split(axes, m)[1], _split(axes, n)[1]
            moved = (m != inside) * rows.data.numel() + (n != outside) * grads.data.numel()
            if moved < math.prod(_sizes(self.dims, axes)):
                m, n = inside, outside
        before, after = rows.matrix(shared, m), grads.matrix(shared, n)
        if product.result == "d C":
            part = Named((before.T @ after).view(1, *_sizes(self.dims, (*m, *n))), (*m, *n))
            self.whole.add_central(part.arranged(axes)[0])
            return part
        if product.result in self.whole.aux:
            stacked, experts = self.whole.aux[product.result], self.experts
        else:
            stacked = grads.data.new_empty(len(self.experts), *_sizes(self.dims, axes))
            experts = list(range(len(self.experts)))
        targets = stacked.permute(_order(axes, (*m, *n))).unbind(0)
        grouped_outer(before, after, self.counts, [targets[e] for e in experts])
        return Named(stacked, axes)

    def merge(self, product: Product, first: Named, second: Named) -> Named | None:
        axes = self.whole.program.axes[product.result]
        first, second = first.alone(), second.alone()
        k, m, n = (
            _split(first.axes, second.axes)[1],
            _split(axes, first.axes)[1],
            _split(axes, second.axes)[1],
        )
        if product.result == "d C":
            self._merge_central(first.matrices(k, m), second.matrices(k, n))
            return None  # nobody reads it
        p, q = first.matrices(m, k), second.matrices(k, n)
        # `torch.bmm`, whose algorithm, unlike `torch.matmul`'s, never depends on ``requires_grad``.
        found = (
            p.flatten(0, 1) @ q[0] if len(q) == 1 else torch.bmm(p.expand(len(q), *p.shape[1:]), q)
        )
        merged = found.view(-1, *_sizes(self.dims, (*m, *n))).permute(_order((*m, *n), axes))
        target = self.whole.aux.get(product.result)
        if target is not None:
            store(target, self.experts, merged)
        return Named(merged, axes)

    def _merge_central(self, p: Tensor, q: Tensor) -> None:
        """``p^T q`` summed over the experts, into the sum over all chunks."""
        matrix = self.whole.central_sum().view(p.shape[2], q.shape[2])
        if p.is_contiguous() and q.is_contiguous():
            accumulate_mm(matrix, p.flatten(0, 1).T, q.flatten(0, 1))
        else:
            for one, other in zip(p, q, strict=True):
                accumulate_mm(matrix, one.T, other)


class Named:
    """A tensor ``[n, axes...]`` of rows or experts (n = 1: shared by the experts), of any strides.

    With ``experts`` it is the stack of all experts, of which these are in use; only `each` can take
    them from it, other methods need them `alone`.
    """

    def __init__(
        self, data: Tensor, axes: tuple[str, ...], experts: list[int] | None = None
    ) -> None:
        self.data, self.axes, self.experts = data, axes, experts
        self._alone: Named | None = None
        self._last: tuple[tuple[Sequence[str], Sequence[str], bool], Tensor] | None = None

    def matrices(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """``[n, first, second]``, each group of axes merged into one; a view if possible. The last
        one is cached."""
        return self._reshaped(first, second, False)

    def matrix(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """``[n first, second]``, likewise."""
        return self._reshaped(first, second, True)

    def _reshaped(self, first: Sequence[str], second: Sequence[str], is_flat: bool) -> Tensor:
        key = (first, second, is_flat)
        if self._last is None or self._last[0] != key:
            arranged = self.arranged((*first, *second))
            sizes, split = arranged.shape, 1 + len(first)
            rows, columns = math.prod(sizes[1:split]), math.prod(sizes[split:])
            shape = (sizes[0] * rows, columns) if is_flat else (sizes[0], rows, columns)
            self._last = (key, arranged.reshape(shape))
        return self._last[1]

    def arranged(self, axes: tuple[str, ...]) -> Tensor:
        """A view ``[n, axes...]`` in another order."""
        return self.data.permute(_order(self.axes, axes))

    def alone(self) -> Named:
        """The experts in use, copied if the stack has others."""
        if self.experts is None:
            return self
        if self._alone is None:
            self._alone = Named(select_experts(self.data, self.experts), self.axes)
        return self._alone

    def each(self, first: Sequence[str], second: Sequence[str]) -> list[Tensor]:
        """`factors` of every expert in use; views where possible: copying a block takes as long as
        multiplying a few rows by it."""
        if self.experts is not None:
            one = Named(self.data[:1], self.axes).factors(first, second)
            if one.data_ptr() == self.data.data_ptr():
                every = self.factors(first, second).unbind(0)
                return [every[e] for e in self.experts]
        return list(self.alone().factors(first, second).unbind(0))

    def factors(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """`matrices` for a GEMM that accepts both layouts: copies, where needed, keep contiguous
        runs."""
        is_transposed = self.axes[-1] in first
        return self.matrices(second, first).mT if is_transposed else self.matrices(first, second)


@lru_cache(maxsize=1024)
def _sizes(dims: BlockDims, axes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(getattr(dims, axis) for axis in axes)


@lru_cache(maxsize=1024)
def _wide(dims: BlockDims, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Axes with more than one index: the position of others does not matter."""
    return tuple(axis for axis in axes if getattr(dims, axis) > 1)


@lru_cache(maxsize=1024)
def _order(axes: tuple[str, ...], wanted: tuple[str, ...]) -> tuple[int, ...]:
    """The permutation that brings a tensor ``[n, axes...]`` into another order of its axes."""
    return (0, *(1 + axes.index(axis) for axis in wanted))


@lru_cache(maxsize=1024)
def _split(
    axes: tuple[str, ...], other: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes that ``other`` lacks, and those that it has."""
    return tuple(a for a in axes if a not in other), tuple(a for a in axes if a in other)


def are_consecutive(experts: list[int]) -> bool:
    """Whether ascending experts have no gap."""
    return experts[-1] - experts[0] + 1 == len(experts)


def select_experts(stacked: Tensor, experts: list[int]) -> Tensor:
    """Some experts of ``[E, ...]``, in ascending order: a view if they are consecutive."""
    if are_consecutive(experts):
        return stacked[experts[0] : experts[-1] + 1]
    return stacked[experts]


def store(stacked: Tensor, experts: list[int], values: Tensor) -> None:
    """``stacked[experts] = values``, without an index if the experts are consecutive."""
    if are_consecutive(experts):
        stacked[experts[0] : experts[-1] + 1] = values
    else:
        stacked[experts] = values


def accumulator(like: Tensor) -> Tensor:
    """Zeros like ``like`` to add partial sums to: at least float32, contiguous."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def accumulate_mm(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total += first @ second`` for an `accumulator`."""
    if total.dtype == first.dtype:
        total.addmm_(first, second)
    else:
        total += first @ second


def grouped_mm(
    rows: Tensor, weights: list[Tensor], counts: list[int], out: Tensor | None = None
) -> Tensor:
    """``out_e = rows_e @ weights[e]`` for consecutive groups of rows; exactly one call per group.

    Args:
        rows: ``[slots * p, k]``, p consecutive rows for each slot.
        weights: ``[k, m]`` for each group, any strides.
        counts: slots of each group; all rows belong to one.
        out: ``[slots * p, m]`` to write to.

    Returns:
        ``[slots * p, m]``.
    """
    if out is None:
        out = rows.new_empty(rows.shape[0], weights[0].shape[1])
    if len(counts) == 1:
        return torch.mm(rows, weights[0], out=out)
    each = rows.shape[0] // sum(counts)
    sizes = [count * each for count in counts]
    parts, results = torch.split_with_sizes(rows, sizes), torch.split_with_sizes(out, sizes)
    for part, weight, result in zip(parts, weights, results, strict=True):
        torch.mm(part, weight, out=result)
    return out


def grouped_outer(
    rows: Tensor, grads: Tensor, counts: list[int], targets: Iterable[Tensor]
) -> None:
    """``targets[e] = rows_e^T @ grads_e``: gradient of a grouped GEMM's weights.

    Args:
        rows, grads: ``[slots * p, k]`` and ``[slots * p, m]``, p consecutive rows for each slot.
        counts: slots of each group; all rows belong to one.
        targets: one for each group; any shape whose elements, in order, are those of ``[k, m]``,
            any strides.
    """
    each = rows.shape[0] // sum(counts)
    sizes = [count * each for count in counts]
    # With few columns MKL accumulates the long sum sequentially; transposed, the rounding error is
    # several times smaller.
    narrow = grads.shape[1] < 16 < rows.shape[1]
    parts, of_parts = torch.split_with_sizes(rows, sizes), torch.split_with_sizes(grads, sizes)
    for part, grad, target in zip(parts, of_parts, targets, strict=True):
        if narrow:
            target.copy_((grad.T @ part).T.reshape(target.shape))
        elif target.is_contiguous():
            torch.mm(part.T, grad, out=target.view(part.shape[1], -1))
        else:
            target.copy_((part.T @ grad).view(target.shape))
