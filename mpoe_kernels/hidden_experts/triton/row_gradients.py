"""Gradients of u, u_gate and the gates, tile by tile as in the forward; also the order of slots for the next launch."""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.hidden_experts.triton.hidden_tiles import block_tile, choices, pre_activation, slopes, times
from mpoe_kernels.triton.device_functions import activate


@triton.jit
def sort_slots(index, pair_of_slot, offsets, pairs, e, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write expert ``e``'s pairs, in order, to its slots; the last expert also writes the final offset."""
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        key = tl.load(index + pair, mask=pair < pairs, other=-1)
        before += ((key >= 0) & (key < e)).to(tl.int32)
    slot = tl.sum(before)
    tl.store(offsets + e, slot)
    for first in tl.range(0, pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        mine = (tl.load(index + pair, mask=pair < pairs, other=-1) == e).to(tl.int32)
        tl.store(pair_of_slot + slot + tl.cumsum(mine, 0) - 1, pair, mask=mine > 0)
        slot += tl.sum(mine)
    if e == EXPERTS - 1:
        tl.store(offsets + EXPERTS, slot)


@triton.jit
def hidden_rows_kernel(
    grad,  # [T, F]
    u,  # [T, F]
    u_gate,  # [T, F]
    gates,  # [T, TOP_K]
    index,  # [T, TOP_K]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    du,  # [T, F]
    du_gate,  # [T, F]
    gate_parts,  # [groups, T, TOP_K] float32: gradients of the gates, one part per group
    pair_of_slot,  # [T TOP_K]
    offsets,  # [EXPERTS + 1]
    tokens,
    F,
    tiles,  # of tokens
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_U_GATE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(tiles of BT tokens * groups * parts of BN of a group's units, and EXPERTS that sort slots)``.

    The parts of a tile's group are consecutive; the first one also computes the gates' gradients.
    """
    PARTS: tl.constexpr = (B + BN - 1) // BN
    program = tl.program_id(0)
    groups = F // B
    if program >= tiles * groups * PARTS:
        sort_slots(index, pair_of_slot, offsets, tokens * TOP_K, program - tiles * groups * PARTS, EXPERTS, BLOCK)
    else:
        unit = (program % PARTS) * BN + tl.arange(0, BN)
        group = program // PARTS % groups
        token = program // PARTS // groups * BT + tl.arange(0, BT)
        key, gate, pair, asked = choices(index, gates, token, tokens, EXPERTS, TOP_K, KP)
        acc = tl.zeros((BT, BN), dtype=tl.float32)
        acc_gate = tl.zeros((BT, BN), dtype=tl.float32)
        dgate = tl.zeros((BT, KP), dtype=tl.float32)
        e = tl.min(key)
        while e < EXPERTS:
            mine = key == e
            chosen = tl.sum(mine.to(tl.int32), 1) > 0
            rank = tl.cumsum(chosen.to(tl.int32), 0)
            weight = tl.sum(tl.where(mine, gate, 0.0), 1)
            at = (e.to(tl.int64) * OWN + group % OWN) * B * B
            own_bias = bias + e.to(tl.int64) * F + group * B
            count = tl.sum(chosen.to(tl.int32))
            for first in tl.range(0, count, BM):
                row, used, row_weight = token, chosen, weight
                if BM < BT:
                    place = first + 1 + tl.arange(0, BM)
                    hit = chosen[:, None] & (rank[:, None] == place[None, :])
                    row = tl.sum(tl.where(hit, token[:, None], 0), 0)
                    used = place <= count
                    row_weight = tl.sum(tl.where(hit, weight[:, None], 0.0), 0)
                start = row.to(tl.int64) * F + group * B
                part, part_gate = acc, acc_gate
                if BM < BT:
                    part = tl.zeros((BM, BN), dtype=tl.float32)
                    part_gate = tl.zeros((BM, BN), dtype=tl.float32)
                column = tl.zeros((BM,), dtype=tl.float32)
                for n0 in tl.range(0, B, BK):
                    n = n0 + tl.arange(0, BK)
                    value, z = pre_activation(
                        u + start,
                        u_gate + start,
                        used,
                        right + at,
                        right_gate + at,
                        own_bias,
                        n,
                        GATED,
                        HAS_BIAS,
                        B,
                        BK,
                        PRECISION,
                    )
                    dh = times(grad + start, used, left + at, n, B, True, BK, PRECISION)
                    if NEED_GATES:
                        h = activate(z, ACTIVATION)
                        if GATED:
                            h = h * value
                        column += tl.sum(h * dh, 1)
                    dvalue, dz = slopes(dh * row_weight[:, None], value, z, ACTIVATION, GATED)
                    if NEED_U:
                        dvalue = tl.where(used[:, None], dvalue, 0.0).to(right.dtype.element_ty)
                        tile = tl.trans(block_tile(right + at, unit, n, B))
                        part = tl.dot(dvalue, tile, part, input_precision=PRECISION)
                    if NEED_U_GATE:
                        dz = tl.where(used[:, None], dz, 0.0).to(right.dtype.element_ty)
                        tile = tl.trans(block_tile(right_gate + at, unit, n, B))
                        part_gate = tl.dot(dz, tile, part_gate, input_precision=PRECISION)
                if BM < BT:
                    moves = tl.where(hit, 1.0, 0.0).to(right.dtype.element_ty)
                    if NEED_U:
                        acc = tl.dot(moves, part.to(right.dtype.element_ty), acc, input_precision=PRECISION)
                    if NEED_U_GATE:
                        moved = part_gate.to(right.dtype.element_ty)
                        acc_gate = tl.dot(moves, moved, acc_gate, input_precision=PRECISION)
                    column = tl.sum(tl.where(hit, column[None, :], 0.0), 1)
                else:
                    acc, acc_gate = part, part_gate
                if NEED_GATES:
                    dgate = tl.where(mine & (column != 0.0)[:, None], column[:, None], dgate)
            e = tl.min(tl.where(key > e, key, EXPERTS))
        inside = (token < tokens)[:, None] & (unit < B)[None, :]
        at_out = token.to(tl.int64)[:, None] * F + group * B + unit[None, :]
        if NEED_U:
            tl.store(du + at_out, acc.to(du.dtype.element_ty), mask=inside)
        if NEED_U_GATE:
            tl.store(du_gate + at_out, acc_gate.to(du_gate.dtype.element_ty), mask=inside)
        if NEED_GATES:
            stop = tl.where(program % PARTS == 0, tokens, 0)
            at_gate = gate_parts + group.to(tl.int64) * tokens * TOP_K + pair
            tl.store(at_gate, dgate, mask=asked & (token < stop)[:, None])
