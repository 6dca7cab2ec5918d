"""Sums of partial gradients of experts: of gates, which are by slot, and of blocks that groups share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(parts, at, inside, count, size, out, i, limit):
    """``out[i] = sum_p parts[p, at]`` in order, zero where not ``inside``; ``parts [count, size]``."""
    total = tl.zeros(i.shape, dtype=tl.float32)
    where = parts + at
    for _ in tl.range(0, count):
        total += tl.load(where, mask=inside, other=0.0)
        where += size
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < limit)


@triton.jit
def sums_kernel(
    gate_parts,  # [shares, T K] float32, by slot
    slot_of_pair,  # [T, K]
    right_parts,  # [block_shares, right_size] float32, and so on
    right_gate_parts,
    left_parts,
    dgates,  # [T, K]
    dright,
    dright_gate,
    dleft,
    shares,
    block_shares,
    pairs,
    gate_size,
    right_size,
    right_gate_size,
    left_size,
    BLOCK: tl.constexpr,
):
    """Grid ``(blocks of the largest, 1 or 4)``: sums of parts in order. What has no parts has size 0."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    if which == 0:
        slot = tl.load(slot_of_pair + i, mask=i < gate_size, other=-1)
        sum_of_parts(gate_parts, slot, slot >= 0, shares, pairs, dgates, i, gate_size)
    elif which == 1:
        sum_of_parts(right_parts, i, i < right_size, block_shares, right_size, dright, i, right_size)
    elif which == 2:
        sum_of_parts(
            right_gate_parts, i, i < right_gate_size, block_shares, right_gate_size, dright_gate, i, right_gate_size
        )
    else:
        sum_of_parts(left_parts, i, i < left_size, block_shares, left_size, dleft, i, left_size)
