"""`route`, `dispatch`, `combine` and their gradients on the kernels of `triton_kernels`. Calls: see `op`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.routing import triton_kernels as kernels
from mpoe_kernels.routing.gating import Gating
from mpoe_kernels.routing.op import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall
from mpoe_kernels.triton.start import Tile, cdiv, power_of_two, start

BLOCK = 128  # pairs of one program; ranks inside a block compare all of them with one another
FEW = 128  # at most so many pairs are sorted by one program: more would spill registers
MOST_AT_ONCE = 4096  # pairs sorted by one launch, in which every expert's program reads them all
MOST_BLOCKS = 512  # of pairs that two launches sort, in which a program reads the counts of them all
COUNTED = 4096  # counts that it holds at once
MOST_ROWS = 1 << 28  # bytes of pairs' rows that wait for their sum at once
GATED = 2048  # logits of one program
SORT_BLOCK = 1024  # pairs that it reads at once
CHUNK, PART = 32, 128  # blocks and keys whose counts a program of the prefix holds at once
PART_OF_WIDTH = 512  # of a part of the logits: one token's parts fill as many multiprocessors as its width allows
LOGITS = {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 2}
LOGITS_FEW = LOGITS | {"BM": 16, "BN": 32}
ROWS = {"BM": 16, "BN": 128, "num_warps": 4}
SUMMED = {"BM": 4, "BN": 512, "num_warps": 4}  # where a program sums over a row


def sort_pairs(
    top_k_index: Tensor, num_experts: int, capacity: int | None = None, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a `RouteCall` asks for."""
    tokens, top_k = top_k_index.shape
    pairs = tokens * top_k
    index = top_k_index.contiguous()
    offsets = index.new_empty(num_experts + 1, dtype=torch.int32)
    token_of_slot = index.new_empty(pairs, dtype=torch.int64)
    slot_of_token = index.new_empty(tokens, top_k, dtype=torch.int64)
    if pairs == 0:
        return offsets.zero_(), token_of_slot, slot_of_token
    given: dict[str, Any] = {
        "index": index,
        "mask": None if token_mask is None else token_mask.contiguous().view(torch.uint8),
        "tokens": tokens,
        "EXPERTS": num_experts,
        "TOP_K": top_k,
        "BINS": power_of_two(num_experts + 2),
    }
    found = {"offsets": offsets, "token_of_slot": token_of_slot, "slot_of_token": slot_of_token}
    if pairs <= FEW:
        start(
            kernels.route_few_kernel,
            (1,),
            capacity=capacity or 0,
            HAS_CAPACITY=capacity is not None,
            BLOCK=max(16, power_of_two(pairs)),
            num_warps=8,
            **given,
            **found,
        )
        return offsets, token_of_slot, slot_of_token
    blocks, bins = cdiv(pairs, BLOCK), given["BINS"]
    counts = index.new_empty(blocks + 1, bins, dtype=torch.int32)
    given |= {"counts": counts, "BLOCK": BLOCK, "num_warps": 4}

    def count(by_choice: bool) -> None:
        start(kernels.histogram_kernel, (blocks,), BY_CHOICE=by_choice, **given)
        keys = {"EXPERTS": num_experts, "BINS": bins, "num_warps": 4}
        part = min(PART, bins)
        prefix = {"counts": counts, "offsets": offsets, "blocks": blocks, "PART": part, "CHUNK": CHUNK}
        start(kernels.prefix_kernel, (bins // part,), **prefix, **keys)
        if part < bins:
            start(kernels.offsets_kernel, (1,), totals=counts[blocks], offsets=offsets, **keys)

    if capacity is not None:
        count(by_choice=True)
        keys = index.new_empty(pairs, dtype=torch.int32)
        start(kernels.drop_kernel, (blocks,), keys=keys, capacity=capacity, **given)
        given |= {"index": keys, "mask": None}
    count(by_choice=False)
    start(kernels.scatter_kernel, (blocks,), **given, **found)
    return offsets, token_of_slot, slot_of_token


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T [T, E]`` in parts ``[P, T, E]`` float32, which `gate` adds; P depends on the width alone. One launch
    for 16-bit tokens and a weight of their dtype, or bfloat16 ones and a float32 weight."""
    tokens, width, experts = *x.shape, weight.shape[0]
    if (
        x.dtype == torch.float32
        or weight.dtype not in (x.dtype, torch.float32)
        or (
            x.dtype == torch.float16 and weight.dtype == torch.float32  # whose last digits float16 cannot hold
        )
    ):
        return torch.mm(x.float(), weight.float().t())[None]
    parts = x.new_empty(cdiv(width, PART_OF_WIDTH), tokens, experts, dtype=torch.float32)
    tile = LOGITS_FEW if tokens <= LOGITS_FEW["BM"] else LOGITS
    start(
        kernels.logits_kernel,
        (cdiv(tokens, tile["BM"]), cdiv(experts, tile["BN"]), parts.shape[0]),
        x=x.contiguous(),
        weight=weight.contiguous(),
        parts=parts,
        tokens=tokens,
        width=width,
        share=PART_OF_WIDTH,
        EXPERTS=experts,
        **tile,
    )
    return parts


def _gated(tokens: int, experts: int, top_k: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of the gates' kernels."""
    scan = power_of_two(max(2, experts))
    rows = max(1, min(16, GATED // scan))
    options = {"EXPERTS": experts, "TOP_K": top_k, "SCAN": scan, "KP": power_of_two(top_k), "BM": rows}
    return (cdiv(tokens, rows),), {**options, "num_warps": 4}


def gate(parts: Tensor, top_k: int, raw: bool, scale: float) -> Gating:
    """From parts of logits ``[P, T, E]``. One launch. ``raw``: gates are probabilities, otherwise they sum to 1; both
    times ``scale``."""
    count, tokens, experts = parts.shape
    logits = parts[0] if count == 1 else parts.new_empty(tokens, experts)
    weights, index = parts.new_empty(tokens, top_k), parts.new_empty(tokens, top_k, dtype=torch.int64)
    grid, options = _gated(tokens, experts, top_k)
    start(
        kernels.gate_kernel,
        grid,
        parts=parts,
        logits=None if count == 1 else logits,
        weights=weights,
        index=index,
        tokens=tokens,
        scale=scale,
        PARTS=count,
        RAW=raw,
        **options,
    )
    return Gating(logits, index, weights)


def gate_backward(
    decided: Gating, dlogits: Tensor | None, dweights: Tensor | None, raw: bool, scale: float, in_parts: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of the logits ``[T, E]`` from those of both results, of which one may be missing, and its bfloat16
    parts ``[T, 3 E]``, empty unless ``in_parts``. One launch."""
    logits, index = decided.logits, decided.top_k_index
    (tokens, experts), top_k = logits.shape, index.shape[1]
    found = logits.new_empty(tokens, experts)
    parts = logits.new_empty((tokens, 3 * experts) if in_parts else 0, dtype=torch.bfloat16)
    grid, options = _gated(tokens, experts, top_k)
    start(
        kernels.gate_backward_kernel,
        grid,
        logits=logits,
        index=index,
        dweights=None if dweights is None else dweights.contiguous(),
        given=None if dlogits is None else dlogits.contiguous(),
        dlogits=found,
        parts=parts if in_parts else None,
        tokens=tokens,
        scale=scale,
        RAW=raw,
        **options,
    )
    return found, parts


class SortedSlots(NamedTuple):
    """(token, choice) pairs sorted by expert; those without an expert are last.

    Attributes:
        order: int32 ``[E + 2 + T K]``: the first place of every expert, that of the pairs without one, T K; then the
            pair ``token K + choice`` at every place.
        experts, top_k: E and K.
    """

    order: Tensor
    experts: int
    top_k: int

    @property
    def pairs(self) -> int:
        """T K."""
        return self.order.shape[0] - self.experts - 2

    @property
    def scan(self) -> int:
        """The constant of `expert_tile`."""
        return power_of_two(max(2, self.experts))

    def tiles(self, rows: int) -> int:
        """At most so many tiles of ``rows`` slots of one expert are there, however tokens chose."""
        return (self.pairs + min(self.pairs, self.experts + 1) * (rows - 1)) // rows

    def among(self, tiles: Sequence[Tile]) -> Sequence[Tile]:
        """Of several tiles, the last of which is for few slots of an expert: that one, or all others."""
        if len(tiles) == 1:
            return tiles
        return tiles[-1:] if self.pairs <= min(self.pairs, self.experts) * tiles[-1].rows else tiles[:-1]


def sort_slots(top_k_index: Tensor, num_experts: int) -> SortedSlots:
    """Sort the pairs of ``top_k_index [T, K]``; an entry outside ``0..E-1``: no expert. In one launch, of more pairs
    in two."""
    index, (tokens, top_k) = top_k_index.contiguous(), top_k_index.shape
    pairs = tokens * top_k
    blocks = cdiv(pairs, BLOCK)
    if blocks > MOST_BLOCKS:
        offsets, pair_of_slot, _ = sort_pairs(index.view(-1, 1), num_experts)
        return SortedSlots(torch.cat([offsets, offsets.new_full((1,), pairs), pair_of_slot.int()]), num_experts, top_k)
    order = index.new_empty(num_experts + 2 + pairs, dtype=torch.int32)
    if pairs <= MOST_AT_ONCE:
        start(
            kernels.sort_kernel,
            (num_experts + 1,),
            index=index,
            order=order,
            slots=pairs,
            EXPERTS=num_experts,
            BLOCK=SORT_BLOCK,
            num_warps=4,
        )
        return SortedSlots(order, num_experts, top_k)
    bins = power_of_two(num_experts + 2)
    counts = index.new_empty(blocks, bins, dtype=torch.int32)
    given: dict[str, Any] = {"index": index, "counts": counts, "EXPERTS": num_experts, "BINS": bins, "BLOCK": BLOCK}
    start(
        kernels.histogram_kernel,
        (blocks,),
        mask=None,
        tokens=pairs,
        TOP_K=1,
        BY_CHOICE=False,
        num_warps=4,
        **given,
    )
    start(
        kernels.order_kernel,
        (blocks,),
        order=order,
        slots=pairs,
        CHUNK=max(1, COUNTED // bins),
        num_warps=4,
        **given,
    )
    return SortedSlots(order, num_experts, top_k)


def sum_choices(
    outs: Sequence[Tensor], top_k: int, step: int, write: Callable[[Sequence[Tensor], int, int], None]
) -> None:
    """Sums ``[T, F]`` over a token's choices, in order, of rows ``[T K, columns]`` that ``write(rows, first, last)``
    writes for some of the columns, a multiple of ``step``: as many as `MOST_ROWS` holds. All ``outs`` are alike."""
    tokens, columns = outs[0].shape
    if top_k == 1:
        write(outs, 0, columns)
        return
    most = max(1, MOST_ROWS // (len(outs) * tokens * top_k * outs[0].element_size() * step)) * step
    for first in range(0, columns, most):
        last = min(first + most, columns)
        rows = [out.new_empty(tokens * top_k, last - first) for out in outs]
        write(rows, first, last)
        for row, out in zip(rows, outs, strict=True):
            start(
                kernels.sum_choices_kernel,
                (cdiv(tokens, SUMMED["BM"]), cdiv(last - first, SUMMED["BN"])),
                rows=row,
                out=out,
                tokens=tokens,
                columns=columns,
                first=first,
                last=last,
                TOP_K=top_k,
                **SUMMED,
            )


def collect_rows(
    rows: Tensor, slot_of_token: Tensor, weights: Tensor | None = None, filled: Tensor | None = None
) -> Tensor:
    """``[N, F] -> [T, F]``: a gather over slots, so it is deterministic. Dropped pairs contribute nothing, even NaN.

    Tokens from the number ``filled [1]`` on, if it is given, have no pairs."""
    tokens, top_k = slot_of_token.shape
    out = rows.new_empty(tokens, rows.shape[1])
    start(
        kernels.collect_kernel,
        (cdiv(tokens, ROWS["BM"]), cdiv(rows.shape[1], ROWS["BN"])),
        rows=rows.contiguous(),
        slot_of_token=slot_of_token.contiguous(),
        weights=None if weights is None else weights.contiguous(),
        filled=filled,
        out=out,
        tokens=tokens,
        F=rows.shape[1],
        TOP_K=top_k,
        **ROWS,
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
    y_sorted, grad, weights = call.y_sorted, call.grad.contiguous(), call.top_k_weights
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
