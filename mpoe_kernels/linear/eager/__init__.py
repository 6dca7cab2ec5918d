"""Grouped MPO linear in PyTorch: offsets, bias, activation and their gradients around the products
of a strategy.

`rebuild` makes one expert's weight after the other; the other strategies multiply rows by blocks,
in `rows`, as the program says (`mpoe_kernels.contract.program`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate, lazily
from mpoe_kernels.checks import check_range
from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import INDICES, SEPARABLE_ORDER, BlockDims, applications
from mpoe_kernels.contract.program import recipe
from mpoe_kernels.linear.activation import ACTIVATION, ACTIVATION_GRADIENT
from mpoe_kernels.linear.eager.rebuild import rebuild_backward, rebuild_forward
from mpoe_kernels.linear.eager.rows import ByExpert, accumulator
from mpoe_kernels.linear.gradients import Backward, Forward, Gradients, dense_gradients
from mpoe_kernels.linear.grouped import backward, forward

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

Call = TypeVar("Call", "ForwardCall", "BackwardCall")
LIBRARY = lazily("mpoe_kernels.linear.eager.library", "forward", "backward", "is_able")
BY_EXPERT = ByExpert()
# Half-built weights of a chunk of experts: at most this fraction of a weight. They exist up to
# twice (the rows may need another layout than the one they are built in), and so do their
# gradients.
HALF_SHARE = 0.5
# Rows between operands of a chunk of experts (one expert's may be larger): about the size of a
# last-level cache.
STATE_BYTES = 32 << 20
Group = tuple[int, int, int]  # expert, first slot, last slot + 1


def candidates(plan: Contraction) -> list[Candidate]:
    """Expert by expert, which needs the offsets on the CPU; on a GPU also by grouped products,
    which need not."""
    compute = linear_forward if plan.phase == "forward" else linear_backward
    offered = [Candidate("eager", plan.strategy, plan.strategy, compute, waits=True)]
    if plan.device_type == "cuda" and LIBRARY.is_able(plan):
        by_gemms = getattr(LIBRARY, plan.phase)
        offered.append(
            Candidate("eager", f"{plan.strategy} by grouped GEMMs", plan.strategy, by_gemms)
        )
    return offered


def linear_forward(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    groups, last = _busy_experts(call)
    if call.strategy == "rebuild":
        z = rebuild_forward(call, groups)
        h = None
    else:
        z, h = _rows_forward(call, groups)
    if call.bias is not None:
        z[:last] += call.bias
    is_filled = last == call.slots
    if not is_filled:
        z[last:] = 0
    y = ACTIVATION[call.activation](z)
    if not is_filled:
        y[last:] = 0  # the activation of zero need not be zero
    if h is None:
        h = z.new_empty(0)
    elif not is_filled:
        h[last * call.dims.jC :] = 0
    saved = z.contiguous() if call.saves_z else z.new_empty(0)
    return y.contiguous(), h, saved


def linear_backward(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    groups, last = _busy_experts(call)
    upstream = Upstream(call)
    gradients: Gradients = (None,) * 4
    if not any(call.need_of_plan):
        upstream.rows(0, last)
    elif call.strategy == "rebuild":
        gradients = rebuild_backward(call, upstream, groups)
    else:
        gradients = _rows_backward(call, upstream, groups)
    dbias = upstream.bias
    if dbias is not None:
        dbias = dbias.to(call.grad.dtype)
    results = [*gradients, dbias]
    for place, needed in enumerate(call.need):
        if not needed:
            results[place] = None
    dx, dleft, _, dright, _ = results
    busy = {expert for expert, _, _ in groups}
    idle = [expert for expert in range(call.num_experts) if expert not in busy]
    for stacked in (dleft, dright):
        if stacked is not None and idle:  # an index, even an empty one, is copied to a GPU
            stacked[idle] = 0
    if dx is not None:
        dx[last:] = 0
        if call.row_index is not None:
            of_rows = torch.zeros_like(call.x)
            results[0] = of_rows.index_add_(0, call.row_index, dx)
    return dense_gradients(call, results)


def _busy_experts(call: LinearCall) -> tuple[list[Group], int]:
    """The experts that have slots, and the number of filled slots."""
    offsets = call.expert_offsets.tolist()
    slots = call.slots
    if offsets[0] != 0 or offsets[-1] > slots or offsets != sorted(offsets):
        raise ValueError(
            f"expert_offsets must start at 0, not fall, and end at {slots} at most; got {offsets}"
        )
    if call.row_index is not None:
        check_range("row_index", call.row_index, 0, call.x.shape[0] - 1)
    groups = []
    for expert, start in enumerate(offsets[:-1]):
        stop = offsets[expert + 1]
        if stop > start:
            groups.append((expert, start, stop))
    return groups, offsets[-1]


class Chunk(NamedTuple):
    """Consecutive busy experts and their slots.

    Attributes:
        experts: their numbers, ascending; with idle ones between them where nothing is built.
        start, stop: their slots.
        counts: slots of each.
    """

    experts: list[int]
    start: int
    stop: int
    counts: list[int]

    @property
    def where(self) -> slice | list[int]:
        """These experts of ``[E, ...]``: a view if they are consecutive."""
        first = self.experts[0]
        last = self.experts[-1]
        if last - first + 1 == len(self.experts):
            return slice(first, last + 1)
        return self.experts

    @property
    def slots(self) -> slice:
        """Their slots."""
        return slice(self.start, self.stop)

    def part(self, call: Call, **others: Any) -> Call:
        """Of a call: the products for these experts alone."""
        slots = self.slots
        where = self.where
        if call.row_index is None:
            x = call.x[slots]
        else:
            x = call.x.index_select(0, call.row_index[slots])
        part = replace(
            call,
            x=x,
            left=call.left[where],
            right=call.right[where],
            expert_offsets=torch.tensor([0, *accumulate(self.counts)]),
            bias=None,
            row_index=None,
            activation="none",
            slot_of_token=None,
            **others,
        )
        part.dims = call.dims
        return part


def _chunks(call: LinearCall, groups: list[Group]) -> Iterator[Chunk]:
    """As many busy experts at once as the memory bounds for half-built weights and for rows
    allow."""
    merges, _ = recipe(call.dims, call.strategy)
    most_experts, most_slots = most_at_once(call.dims, call.strategy, call.x.element_size())
    first = 0
    while first < len(groups):
        start = groups[first][1]
        last = first + 1
        while last < min(len(groups), first + most_experts):
            if groups[last][2] - start > most_slots:
                break
            last += 1
        yield _chunk(groups[first:last], bool(merges))
        first = last


def _chunk(groups: list[Group], builds: bool) -> Chunk:
    counts = {expert: stop - start for expert, start, stop in groups}
    first, start, _ = groups[0]
    last, _, stop = groups[-1]
    experts = list(counts)
    if not builds:
        experts = list(range(first, last + 1))
    of_experts = [counts.get(expert, 0) for expert in experts]
    return Chunk(experts, start, stop, of_experts)


@lru_cache(maxsize=1024)
def most_at_once(dims: BlockDims, strategy: str, itemsize: int) -> tuple[int, int]:
    """Experts and slots of a chunk, within the memory bounds for half-built weights and for rows;
    separable's rows are no larger than its results."""
    merges, order = recipe(dims, strategy)
    experts = sys.maxsize
    if merges:
        largest = max(dims.elements(INDICES[built]) for built, _, _ in merges)
        experts = max(1, int(HALF_SHARE * dims.weight_elements / largest))
    if dims.is_separable and order == SEPARABLE_ORDER:
        return experts, sys.maxsize
    widest = max(step.after for step in applications(dims, order))
    return experts, max(1, STATE_BYTES // (widest * itemsize))


def _rows_forward(call: ForwardCall, groups: list[Group]) -> tuple[Tensor, Tensor | None]:
    """``(z [N, F], h)``: pre-activation without bias, and the central step's result ``[N jC, b]``
    if separable is to save it; both are undefined in slots without an expert."""
    z = None
    h = None
    for chunk in _chunks(call, groups):
        rows, kept, _ = forward(chunk.part(call), BY_EXPERT, chunk.counts)
        z = _placed(z, rows, chunk.slots, call.slots)
        if call.saves_h:
            h = _placed(h, kept.view(len(rows), -1), chunk.slots, call.slots)
    if z is None:
        z = call.x.new_empty(call.slots, call.out_features)
    if call.saves_h and h is None:
        h = call.x.new_empty(call.slots, call.dims.jC * call.dims.b)
    return z, None if h is None else h.view(-1, call.dims.b)


def _placed(whole: Tensor | None, part: Tensor, where: slice | list[int], size: int) -> Tensor:
    """The part of a result that one chunk gives, written to the whole; itself if it is all."""
    if len(part) == size:
        return part
    if whole is None:
        whole = part.new_empty(size, *part.shape[1:])
    whole[where] = part
    return whole


def _rows_backward(call: BackwardCall, upstream: Upstream, groups: list[Group]) -> Gradients:
    """Rows other than h, which the forward of separable saved, are computed again if they are
    read."""
    need_x, need_left, need_central, need_right = call.need_of_plan
    experts = call.num_experts
    dx = dleft = dright = None
    dcentral = accumulator(call.central)
    for chunk in _chunks(call, groups):
        of_x, of_left, of_central, of_right, _ = _chunk_backward(call, upstream, chunk)
        if need_x:
            dx = _placed(dx, of_x, chunk.slots, call.slots)
        if need_left:
            dleft = _placed(dleft, of_left, chunk.where, experts)
        if need_central:
            dcentral += of_central
        if need_right:
            dright = _placed(dright, of_right, chunk.where, experts)
    if not groups:
        dx = call.x.new_empty(call.slots, call.in_features)
        dleft = torch.empty_like(call.left)
        dright = torch.empty_like(call.right)
    return dx, dleft, dcentral.to(call.central.dtype), dright


def _chunk_backward(call: BackwardCall, upstream: Upstream, chunk: Chunk) -> Backward:
    h = call.h
    if call.saved_h is not None:
        by_slot = h.view(call.slots, -1)
        h = by_slot[chunk.slots].view(-1, call.dims.b)
    grad = upstream.rows(chunk.start, chunk.stop)
    need = [*call.need_of_plan, False]
    part = chunk.part(call, grad=grad, h=h, saved=grad, need=need)
    return backward(part, BY_EXPERT, chunk.counts)


class Upstream:
    """The gradient of the pre-activations; the activation's is applied only when rows are
    requested, so they are still in cache when an expert's products read them. Every row must be
    requested exactly once.

    Attributes:
        bias: gradient of the bias, summed over the rows requested so far; None if it is not needed.
    """

    def __init__(self, call: BackwardCall) -> None:
        self._grad = call.grad
        self._activation = call.activation
        self._saved = call.saved
        dtype = torch.promote_types(call.grad.dtype, torch.float32)
        self.bias = call.grad.new_zeros(call.out_features, dtype=dtype) if call.need[4] else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Those of slots ``start..stop``."""
        saved = self._saved
        if self._activation != "none":
            saved = self._saved[start:stop]
        dz = ACTIVATION_GRADIENT[self._activation](self._grad[start:stop], saved)
        if self.bias is not None:
            self.bias += dz.sum(0)
        return dz
