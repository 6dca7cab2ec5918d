"""A stable counting sort of (token, choice) pairs, and the row movements it describes.

How arrays are indexed (t: token, j: choice, e: expert, p = t TOP_K + j: pair, s: slot, the place of
a pair in the sort, f: feature):

    index[p], mask[t]           the expert of a pair; whether a token is routed
    keys[p]                     the expert of a pair that was not dropped; EXPERTS: none
    counts[program, key]        pairs of every key in a program's part of the pairs
    offsets[e]                  first slot of an expert; offsets[EXPERTS]: of the pairs without one
    token_of_slot[s]            a slot's token
    slot_of_token[p]            a pair's slot, -1 without an expert
    rows[s, f], out[t, f]       rows of slots; of tokens

Counting takes two launches: a histogram for every part of the pairs, and a stable scatter, in which
a program adds the histograms of all parts. Some thousands of pairs take one where none is dropped
(`sort_kernel`). No launch depends on a number that only the device knows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import COUNTS, row_tile, store_rows


@triton.jit
def pair_key(pair, inside, index, mask, EXPERTS: tl.constexpr, TOP_K: tl.constexpr):
    """Expert of a pair, ``EXPERTS`` if it has none or its token is masked, ``EXPERTS + 1``
    outside."""
    expert = tl.load(index + pair, mask=inside, other=0)
    key = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)
    if mask is not None:
        is_routed = tl.load(mask + pair // TOP_K, mask=inside, other=0) != 0
        key = tl.where(is_routed, key, EXPERTS)
    return tl.where(inside, key, EXPERTS + 1)


@triton.jit
def pair_at(position, tokens, TOP_K: tl.constexpr, BY_CHOICE: tl.constexpr):
    """Pair ``token * TOP_K + choice`` at a position of the order: by token, or all first choices
    first."""
    if BY_CHOICE:
        position = (position % tokens) * TOP_K + position // tokens
    return position


@triton.jit(do_not_specialize=COUNTS)
def histogram_kernel(
    index,  # [tokens, TOP_K], or keys of the pairs
    mask,  # [tokens] or None
    counts,  # [programs, BINS]
    tokens,
    size,  # pairs of a program, a multiple of BLOCK
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BY_CHOICE: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(parts of the pairs,)``: how often every key occurs in a part."""
    begin = tl.program_id(0) * size
    total = tl.zeros((BINS,), dtype=tl.int32)
    for first in tl.range(begin, begin + size, BLOCK):
        position = first + tl.arange(0, BLOCK)
        pair = pair_at(position, tokens, TOP_K, BY_CHOICE)
        key = pair_key(pair, position < tokens * TOP_K, index, mask, EXPERTS, TOP_K)
        total += tl.histogram(key, BINS)
    tl.store(counts + tl.program_id(0) * BINS + tl.arange(0, BINS), total)


@triton.jit
def counted_pairs(counts, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """``(total, earlier) [BINS]``: pairs of every key in all programs' parts, ``CHUNK`` of which
    are read at once, and in those before this program's."""
    total = tl.zeros((CHUNK, BINS), dtype=tl.int32)
    earlier = tl.zeros((CHUNK, BINS), dtype=tl.int32)
    for first in tl.range(0, tl.num_programs(0), CHUNK):
        part = first + tl.arange(0, CHUNK)
        at = counts + part[:, None] * BINS + tl.arange(0, BINS)[None, :]
        count = tl.load(at, mask=(part < tl.num_programs(0))[:, None], other=0)
        total += count
        earlier += tl.where((part < tl.program_id(0))[:, None], count, 0)
    return tl.sum(total, 0), tl.sum(earlier, 0)


@triton.jit(do_not_specialize=COUNTS)
def drop_kernel(
    index,
    mask,
    counts,  # [programs, BINS], in the order of choices
    keys,  # [tokens TOP_K] int32: what remains of the pairs' experts
    tokens,
    size,
    capacity,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid ``(parts of the pairs,)``: pairs that come ``capacity`` or more pairs late for their
    expert lose it."""
    _total, earlier = counted_pairs(counts, BINS, CHUNK)
    begin = tl.program_id(0) * size
    here = tl.arange(0, BLOCK)
    for first in tl.range(begin, begin + size, BLOCK):
        position = first + here
        inside = position < tokens * TOP_K
        pair = pair_at(position, tokens, TOP_K, True)
        key = pair_key(pair, inside, index, mask, EXPERTS, TOP_K)
        rank = stable_rank(key, here) + tl.gather(earlier, key, 0)
        tl.store(keys + pair, tl.where(rank >= capacity, EXPERTS, key), mask=inside)
        earlier += tl.histogram(key, BINS)


@triton.jit
def stable_rank(key, here):
    """Number of earlier entries of the block with the same key."""
    earlier = (key[:, None] == key[None, :]) & (here[None, :] < here[:, None])
    return tl.sum(earlier.to(tl.int32), 1)


@triton.jit
def store_slots(
    token_of_slot, slot_of_token, pair, slot, key, mask, EXPERTS: tl.constexpr, TOP_K: tl.constexpr
):
    """What a sort says of pairs and their slots; a pair without an expert has none."""
    token = (pair // TOP_K).to(token_of_slot.dtype.element_ty)
    tl.store(token_of_slot + slot, token, mask=mask)
    if slot_of_token is not None:
        slot = tl.where(key == EXPERTS, -1, slot)
        tl.store(slot_of_token + pair, slot.to(tl.int64), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def scatter_kernel(
    index,  # [tokens, TOP_K], or keys of the pairs
    mask,
    counts,  # [programs, BINS]
    offsets,  # [OFFSETS]: where every key's slots begin
    token_of_slot,
    slot_of_token,  # or None
    tokens,
    size,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    OFFSETS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid ``(parts of the pairs,)``: every pair finds its slot."""
    total, earlier = counted_pairs(counts, BINS, CHUNK)
    begins = tl.cumsum(total, 0) - total
    bins = tl.arange(0, BINS)
    if tl.program_id(0) == 0:
        tl.store(offsets + bins, begins, mask=bins < OFFSETS)
    earlier += begins
    begin = tl.program_id(0) * size
    here = tl.arange(0, BLOCK)
    for first in tl.range(begin, begin + size, BLOCK):
        pair = first + here
        inside = pair < tokens * TOP_K
        key = pair_key(pair, inside, index, mask, EXPERTS, TOP_K)
        slot = stable_rank(key, here) + tl.gather(earlier, key, 0)
        store_slots(token_of_slot, slot_of_token, pair, slot, key, inside, EXPERTS, TOP_K)
        earlier += tl.histogram(key, BINS)


@triton.jit(do_not_specialize=COUNTS)
def sort_kernel(
    index,  # [tokens, TOP_K]
    mask,
    offsets,  # [OFFSETS]
    token_of_slot,
    slot_of_token,  # or None
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(EXPERTS + 1,)``: what the other two do, in one launch: each program counts the pairs
    of earlier experts and gives its own their slots, in order; the last expert is none."""
    e = tl.program_id(0)
    pairs = tokens * TOP_K
    earlier = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        key = pair_key(pair, pair < pairs, index, mask, EXPERTS, TOP_K)
        earlier += (key < e).to(tl.int32)
    begin = tl.sum(earlier, 0)
    tl.store(offsets + e, begin)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        key = pair_key(pair, pair < pairs, index, mask, EXPERTS, TOP_K)
        mine = key == e
        count = mine.to(tl.int32)
        slot = begin + tl.cumsum(count, 0) - 1
        store_slots(token_of_slot, slot_of_token, pair, slot, key, mine, EXPERTS, TOP_K)
        begin += tl.sum(count, 0)
    if e == OFFSETS - 2:
        tl.store(offsets + e + 1, begin)


@triton.jit(do_not_specialize=COUNTS)
def collect_kernel(
    rows,  # [N, F]
    slot_of_token,  # [T, K]; None: rows are those of pairs
    weights,  # [T, K] or None
    filled,  # how many tokens have rows, or None: all
    out,  # [T, >= F]
    tokens,
    F,
    stride,  # of out
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(token blocks, column blocks)``: sum of a token's rows in order, weighted, rounded
    once; dropped pairs are not even read."""
    token = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    inside = token < tokens
    with_rows = inside
    if filled is not None:
        with_rows = token < tl.load(filled)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        slot = tl.where(with_rows, pair, -1)
        if slot_of_token is not None:
            slot = tl.load(slot_of_token + pair, mask=with_rows, other=-1)
        value = row_tile(rows + slot * F, slot >= 0, column, F).to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + pair, mask=slot >= 0, other=0.0)
            value = value * weight.to(tl.float32)[:, None]
        total += value
    mask = inside[:, None] & (column < F)[None, :]
    tl.store(
        out + token[:, None] * stride + column[None, :], total.to(out.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=COUNTS)
def combine_backward_kernel(
    grad,  # [T, F]
    rows,  # [N, F]
    token_of_slot,
    slot_of_token,
    weights,  # [T, K]
    dy,  # [N, F] or None
    dweights,  # [T, K], zeros, or None
    slots,
    F,
    TOP_K: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Grid ``(slot blocks,)``: of rows, the gradient of their token times its weight, zero in a
    slot that no pair kept; of weights, that gradient times the row."""
    slot = tl.program_id(0) * BM + tl.arange(0, BM)
    token = tl.load(token_of_slot + slot, mask=slot < slots, other=0)
    weight = tl.zeros((BM,), dtype=tl.float32)
    pair = token * TOP_K
    owned = slot < 0
    for choice in tl.static_range(TOP_K):
        at = token * TOP_K + choice
        is_slot = tl.load(slot_of_token + at, mask=slot < slots, other=-1) == slot
        weight += tl.load(weights + at, mask=is_slot, other=0.0).to(tl.float32)
        pair = tl.where(is_slot, at, pair)
        owned = owned | is_slot
    total = tl.zeros((BM,), dtype=tl.float32)
    for first in tl.range(0, F, BN):
        column = first + tl.arange(0, BN)
        g = row_tile(grad + token * F, owned, column, F).to(tl.float32)
        if dweights is not None:
            row = row_tile(rows + slot.to(tl.int64) * F, owned, column, F)
            total += tl.sum(g * row.to(tl.float32), 1)
        if dy is not None:
            store_rows(dy, slot.to(tl.int64), g * weight[:, None], slot < slots, column, F)
    if dweights is not None:
        tl.store(dweights + pair, total.to(dweights.dtype.element_ty), mask=owned)
