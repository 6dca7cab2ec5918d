"""Grouped MPO linear in PyTorch: a strategy's products, some experts after the others, as far as
memory allows.

The walk through the products is `mpoe_kernels.linear.grouped`'s; here are those of rows with the
blocks of their own experts, one expert after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.checks import check_range
from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.orders import INDICES, SEPARABLE_ORDER, BlockDims, applications
from mpoe_kernels.contract.program import recipe
from mpoe_kernels.linear.eager import library
from mpoe_kernels.linear.gradients import Backward, Forward, Slots
from mpoe_kernels.linear.grouped import BlocksProduct, RowsProduct, backward, forward

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

# Half-built weights of the experts at once: at most this fraction of a weight. They exist up to
# twice (the rows may need another layout than the one they are built in), and so do their
# gradients. Of whole weights one is built at a time.
HALF_SHARE = 0.5
# Rows between operands of the experts at once (one expert's may be larger): about the size of a
# last-level cache.
STATE_BYTES = 32 << 20


def candidates(plan: Contraction) -> list[Candidate]:
    """Expert by expert, which needs the offsets on the CPU; on a GPU also by grouped products,
    which need not."""
    compute = linear_forward if plan.phase == "forward" else linear_backward
    offered = [Candidate("eager", plan.strategy, plan.strategy, compute, waits=True)]
    if plan.device_type == "cuda" and library.is_able(plan):
        by_gemms = getattr(library, plan.phase)
        offered.append(
            Candidate("eager", f"{plan.strategy} by grouped GEMMs", plan.strategy, by_gemms)
        )
    return offered


def linear_forward(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    return forward(call, ByExpert(), parts_in_memory(call))


def linear_backward(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return backward(call, ByExpert(), parts_in_memory(call))


def _slots_of_experts(call: LinearCall) -> list[int]:
    """How many slots every expert owns."""
    offsets = call.expert_offsets.tolist()
    slots = call.slots
    if offsets[0] != 0 or offsets[-1] > slots or offsets != sorted(offsets):
        raise ValueError(
            f"expert_offsets must start at 0, not fall, and end at {slots} at most; got {offsets}"
        )
    if call.row_index is not None:
        check_range("row_index", call.row_index, 0, call.x.shape[0] - 1)
    return [stop - start for start, stop in zip(offsets, offsets[1:], strict=False)]


def parts_in_memory(call: LinearCall) -> list[Slots]:
    """As many busy experts at once as the memory bounds for half-built weights and for rows allow;
    where nothing is built, with the idle ones between them."""
    counts = _slots_of_experts(call)
    merges, _ = recipe(call.dims, call.strategy)
    most_experts, most_slots = most_at_once(call.dims, call.strategy, call.x.element_size())
    groups: list[list[int]] = []
    rows = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        rows += count
        if not groups or len(groups[-1]) == most_experts or rows > most_slots:
            groups.append([])
            rows = count
        groups[-1].append(expert)
    parts = []
    start = 0
    for experts in groups:
        between = range(experts[0], experts[-1] + 1)
        if not merges:
            experts = list(between)
        of_experts = [counts[expert] for expert in experts]
        where: slice | list[int] = experts
        if len(experts) == len(between):
            where = slice(between.start, between.stop)
        stop = start + sum(of_experts)
        is_part = len(experts) < len(counts) or stop - start < call.slots
        rows_of_part = slice(start, stop)
        offsets = call.expert_offsets
        parts.append(Slots(offsets, stop - start, is_part, where, rows_of_part, of_experts))
        start = stop
    return parts


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


class ByExpert:
    """See `mpoe_kernels.linear.grouped.Grouped`: for slots that all have an expert."""

    fuses = False

    def rows(self, product: RowsProduct) -> tuple[Tensor, None]:
        rows = product.rows
        blocks = product.blocks
        out = product.out
        if out is None:
            out = rows.new_empty(*rows.shape[:2], blocks.shape[2])
        counts = product.slots.of_experts
        assert counts is not None, "the offsets have been read"
        grouped_mm(rows.flatten(0, 1), blocks.unbind(), counts, out.flatten(0, 1))
        return out, None

    def blocks(self, product: BlocksProduct) -> Tensor:
        rows = product.rows
        grads = product.grads
        counts = product.slots.of_experts
        assert counts is not None, "the offsets have been read"
        out = rows.new_empty(len(counts), rows.shape[2], grads.shape[2])
        grouped_outer(rows.flatten(0, 1), grads.flatten(0, 1), counts, out.unbind())
        return out


def _split(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """``[slots * p, k]`` by groups of ``counts`` slots, to which all rows belong."""
    of_slot = rows.shape[0] // sum(counts)
    return torch.split_with_sizes(rows, [count * of_slot for count in counts])


def grouped_mm(rows: Tensor, weights: Sequence[Tensor], counts: list[int], out: Tensor) -> None:
    """``out_e = rows_e @ weights[e]`` for consecutive groups of rows; one call per group that has
    any.

    Args:
        rows: ``[slots * p, k]``, p consecutive rows for each slot.
        weights: ``[k, m]`` for each group, any strides.
        counts: slots of each group; all rows belong to one.
        out: ``[slots * p, m]``.
    """
    parts = _split(rows, counts)
    results = _split(out, counts)
    for part, weight, result in zip(parts, weights, results, strict=True):
        if len(part):
            torch.mm(part, weight, out=result)


def grouped_outer(
    rows: Tensor, grads: Tensor, counts: list[int], targets: Sequence[Tensor]
) -> None:
    """``targets[e] = rows_e^T @ grads_e``: gradient of a grouped GEMM's weights.

    Args:
        rows, grads: ``[slots * p, k]`` and ``[slots * p, m]``, p consecutive rows for each slot.
        counts: slots of each group; all rows belong to one.
        targets: dense ``[k, m]`` for each group.
    """
    # With few columns MKL accumulates the long sum sequentially; transposed, the rounding error is
    # several times smaller.
    narrow = grads.shape[1] < 16 < rows.shape[1]
    parts = _split(rows, counts)
    of_parts = _split(grads, counts)
    for part, grad, target in zip(parts, of_parts, targets, strict=True):
        if narrow:
            target.copy_((grad.T @ part).T)
        else:
            torch.mm(part.T, grad, out=target)
