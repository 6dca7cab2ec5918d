"""`route`, `dispatch`, `combine` and their gradients on the kernels of `triton_kernels`. Calls: see
`op`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.routing import triton_kernels as kernels
from mpoe_kernels.routing.op import (
    CombineBackwardCall,
    CombineCall,
    DispatchBackwardCall,
    DispatchCall,
    RouteCall,
)
from mpoe_kernels.triton.start import cdiv, dense, power_of_two, start

BLOCK = 128  # pairs of one program; ranks inside a block compare all of them with one another
MOST_AT_ONCE = 4096  # pairs sorted by one launch, in which every expert's program reads them all
# Of the pairs that two launches sort, in which a program reads the counts of them all.
MOST_PARTS = 512
COUNTED = 4096  # counts that it holds at once
MOST_ROWS = 1 << 28  # bytes of pairs' rows that wait for their sum at once
SORT_BLOCK = 512  # pairs that it reads at once; of 1024 its machine code loads one after the other
ROWS = {"BM": 16, "BN": 128, "num_warps": 4}
# Where a program sums over a row: so few numbers that the loads of all choices are in flight.
SUMMED = {"BM": 4, "BN": 256, "num_warps": 4}


def sort_pairs(
    top_k_index: Tensor,
    num_experts: int,
    capacity: int | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `RouteCall` asks for. In one launch, of more pairs in two, with a capacity in four."""
    offsets = top_k_index.new_empty(num_experts + 1, dtype=torch.int32)
    token_of_slot = top_k_index.new_empty(top_k_index.numel(), dtype=torch.int64)
    slot_of_token = top_k_index.new_empty(top_k_index.shape, dtype=torch.int64)
    _sort(top_k_index, num_experts, capacity, token_mask, offsets, token_of_slot, slot_of_token)
    return offsets, token_of_slot, slot_of_token


def _sort(
    top_k_index: Tensor,
    num_experts: int,
    capacity: int | None,
    token_mask: Tensor | None,
    offsets: Tensor,
    token_of_slot: Tensor,
    slot_of_token: Tensor | None,
) -> None:
    """Writes the last three, see `triton_kernels`."""
    tokens, top_k = top_k_index.shape
    pairs = tokens * top_k
    mask = dense(token_mask)
    if mask is not None:
        mask = mask.view(torch.uint8)
    given: dict[str, Any] = {
        "index": top_k_index.contiguous(),
        "mask": mask,
        "tokens": tokens,
        "EXPERTS": num_experts,
        "TOP_K": top_k,
    }
    results = {
        "offsets": offsets,
        "token_of_slot": token_of_slot,
        "slot_of_token": slot_of_token,
        "OFFSETS": len(offsets),
    }
    if pairs == 0 or (pairs <= MOST_AT_ONCE and capacity is None):
        start(
            kernels.sort_kernel,
            (num_experts + 1,),
            BLOCK=SORT_BLOCK,
            num_warps=4,
            **given,
            **results,
        )
        return
    given |= _counted(pairs, num_experts)
    if capacity is not None:
        keys = top_k_index.new_empty(pairs, dtype=torch.int32)
        _two(given, True, kernels.drop_kernel, keys=keys, capacity=capacity)
        given |= {"index": keys, "mask": None}
    _two(given, False, kernels.scatter_kernel, **results)


def _counted(pairs: int, num_experts: int) -> dict[str, int]:
    """How the kernels that count share the pairs: in parts that are multiples of a block."""
    bins = power_of_two(num_experts + 2)
    block = BLOCK if bins <= COUNTED else BLOCK // 2  # beside more bins, ranks would spill
    blocks = cdiv(pairs, block)
    size = cdiv(blocks, MOST_PARTS) * block
    warps = 4 if bins <= MOST_PARTS else 8  # a program holds three numbers of every bin
    return {"size": size, "BINS": bins, "BLOCK": block, "num_warps": warps}


def _two(given: dict[str, Any], by_choice: bool, kernel: Any, **others: Any) -> None:
    """Counts, and what a kernel does with them."""
    parts = cdiv(given["tokens"] * given["TOP_K"], given["size"])
    counts = given["index"].new_empty(parts, given["BINS"], dtype=torch.int32)
    start(kernels.histogram_kernel, (parts,), counts=counts, BY_CHOICE=by_choice, **given)
    chunk = max(1, COUNTED // given["BINS"])
    start(kernel, (parts,), counts=counts, CHUNK=chunk, **given, **others)


class SortedSlots(NamedTuple):
    """(token, choice) pairs sorted by expert; those without an expert are last.

    Attributes:
        order: int32 ``[E + 2 + T K]``: the first place of every expert, that of the pairs without
            one, T K; then the pair ``token K + choice`` at every place.
        experts, pairs: E and T K.
    """

    order: Tensor
    experts: int
    pairs: int
    pair_experts: None = None  # see `PairsAlone`

    def tiles(self, rows: int) -> int:
        """At most so many tiles of ``rows`` slots of one expert are there, however tokens chose."""
        segments = min(self.pairs, self.experts + 1)
        return (self.pairs + segments * (rows - 1)) // rows

    def fit(self, rows: int) -> bool:
        """Whether ``rows`` slots of an expert are as many as there are on average."""
        return self.pairs <= min(self.pairs, self.experts) * rows


class PairsAlone(NamedTuple):
    """Few pairs, which are not sorted: a program has one of them, in its tile's first row.

    Attributes:
        pair_experts: int64 ``[T, K]``.
    """

    pair_experts: Tensor
    order: None = None  # see `SortedSlots`

    def tiles(self, rows: int) -> int:
        """One of each pair, of however many rows."""
        return self.pair_experts.numel()

    def fit(self, rows: int) -> bool:
        """One slot fits any tile."""
        return True


Slots = SortedSlots | PairsAlone


def sort_slots(top_k_index: Tensor, num_experts: int) -> SortedSlots:
    """Sort the pairs of ``top_k_index [T, K]``; an entry outside ``0..E-1``: no expert. In one
    launch, of more pairs in two."""
    pairs = top_k_index.numel()
    order = top_k_index.new_empty(num_experts + 2 + pairs, dtype=torch.int32)
    offsets = order[: num_experts + 2]
    pair_of_slot = order[num_experts + 2 :]
    index = top_k_index.reshape(pairs, 1)  # a pair is a token with one choice
    _sort(index, num_experts, None, None, offsets, pair_of_slot, None)
    return SortedSlots(order, num_experts, pairs)


def rows_to_sum(
    outs: Mapping[str, Tensor], columns: int, top_k: int, step: int
) -> Iterator[tuple[Mapping[str, Tensor], int, int]]:
    """Memory for rows of pairs, which the caller's loop fills and which are summed after that.

    Args:
        outs: alike, ``[T, columns]``: the sums over a token's choices, in order.
        columns, top_k: sizes.
        step: pieces of the columns are multiples of it, and as large as `MOST_ROWS` allows.

    Yields:
        rows ``[T K, last - first]`` by the names of ``outs``, first, last. With one choice they are
        the sums.
    """
    if top_k == 1 or not outs:
        yield outs, 0, columns
        return
    like = next(iter(outs.values()))
    pairs = len(like) * top_k
    row_bytes = len(outs) * pairs * like.element_size()
    most = max(1, MOST_ROWS // (row_bytes * step)) * step
    for first in range(0, columns, most):
        last = min(first + most, columns)
        rows = {name: like.new_empty(pairs, last - first) for name in outs}
        yield rows, first, last
        for name, out in outs.items():
            _collect(rows[name], out[:, first:last], top_k, SUMMED)


def _collect(
    rows: Tensor, out: Tensor, top_k: int, tile: Mapping[str, int], **slots: Tensor | None
) -> None:
    """Writes sums of rows, those of pairs or the ``slots`` of `collect_rows`."""
    tokens, columns = out.shape
    arguments = {"slot_of_token": None, "weights": None, "filled": None} | slots
    start(
        kernels.collect_kernel,
        (cdiv(tokens, tile["BM"]), cdiv(columns, tile["BN"])),
        rows=rows,
        out=out,
        tokens=tokens,
        F=columns,
        stride=out.stride(0),
        TOP_K=top_k,
        **arguments,
        **tile,
    )


def collect_rows(
    rows: Tensor, slot_of_token: Tensor, weights: Tensor | None = None, filled: Tensor | None = None
) -> Tensor:
    """``[N, F] -> [T, F]``: a gather over slots, so it is deterministic. Dropped pairs contribute
    nothing, even NaN.

    Tokens from the number ``filled [1]`` on, if it is given, have no pairs."""
    tokens, top_k = slot_of_token.shape
    out = rows.new_empty(tokens, rows.shape[1])
    _collect(
        rows.contiguous(),
        out,
        top_k,
        ROWS,
        slot_of_token=slot_of_token.contiguous(),
        weights=dense(weights),
        filled=filled,
    )
    return out


def route(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    return sort_pairs(call.top_k_index, call.num_experts, call.capacity, call.token_mask)


def dispatch(call: DispatchCall) -> Tensor:
    """Rows as slots have them: a slot's only choice is its token."""
    return collect_rows(call.x, call.token_of_slot[:, None], filled=call.expert_offsets[-1:])


def dispatch_backward(call: DispatchBackwardCall) -> Tensor:
    return collect_rows(call.grad, call.slot_of_token)


def combine(call: CombineCall) -> Tensor:
    return collect_rows(call.y_sorted, call.slot_of_token, call.top_k_weights)


def combine_backward(call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gates. One launch."""
    y_sorted = call.y_sorted
    grad = call.grad.contiguous()
    weights = call.top_k_weights
    slots, columns = y_sorted.shape
    dy = grad.new_empty(y_sorted.shape if call.need_y else 0)
    dweights = weights.new_zeros(weights.shape if call.need_weights else 0)
    start(
        kernels.combine_backward_kernel,
        (cdiv(slots, SUMMED["BM"]),),
        grad=grad,
        rows=y_sorted.contiguous(),
        token_of_slot=call.token_of_slot,
        slot_of_token=call.slot_of_token.contiguous(),
        weights=weights.contiguous(),
        dy=dy if call.need_y else None,
        dweights=dweights if call.need_weights else None,
        slots=slots,
        F=columns,
        TOP_K=weights.shape[1],
        **SUMMED,
    )
    return dy, dweights
