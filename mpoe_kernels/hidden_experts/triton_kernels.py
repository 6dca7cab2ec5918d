"""Kernels of `hidden_experts` over slots sorted by expert: a program has slots of one expert and some groups of units.

A row of a product depends on one slot alone, so an Inf or NaN stays with its token. Blocks of more than ``BN`` units
are computed in parts, each of which recomputes the hidden activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import (
    activate,
    add_rows,
    end_turn,
    expert_tile,
    matrix_tile,
    next_tile,
    no_rows,
    pre_activation,
    row_tile,
    rows_times,
    slopes,
    wait_for_turn,
)


@triton.jit
def hidden_rows_kernel(
    grad,  # [T, F] of a backward
    u,  # [T, F]
    u_gate,  # [T, F]
    gates,  # [T, TOP_K]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    out,  # [T, F]: o, or du of a backward
    out_gate,  # [T, F]: du_gate
    gate_parts,  # [shares, T TOP_K] float32: gradients of the gates
    tickets,  # [shares, parts], as done
    done,
    tokens,
    F,
    share,  # groups of one program
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    NEED_OUT: tl.constexpr,
    NEED_OUT_GATE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, shares of the groups, parts of BN of a group's units)``: every token's sum over its
    experts. Of a group's parts, the first one also computes the gates' gradients."""
    part = tl.program_id(2)
    turn = tl.program_id(1) * tl.num_programs(2) + part
    tile = next_tile(tickets + turn, TOP_K)
    choice, expert, place, used = expert_tile(offsets, tile, TOP_K, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    pair = tl.load(pair_of_slot + place, mask=used, other=0)
    token = (pair // TOP_K).to(tl.int64)
    unit = part * BN + tl.arange(0, BN)
    inside = used[:, None] & (unit < B)[None, :]
    at_gate = gate_parts + tl.program_id(1).to(tl.int64) * tokens * TOP_K + pair
    has_gate = used & (place < tl.where(part == 0, tokens * TOP_K, 0))
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, F // B)
    wait_for_turn(choice, tokens, done + turn, TOP_K)
    if expert == EXPERTS:
        for group in tl.range(first, last):
            if NEED_OUT:
                no_rows(out + token * F + group * B, used, choice, unit, B)
            if NEED_OUT_GATE:
                no_rows(out_gate + token * F + group * B, used, choice, unit, B)
        end_turn(used, done + turn, TOP_K)
        if NEED_GATES:
            tl.store(at_gate, tl.zeros((BM,), dtype=tl.float32), mask=has_gate)
        return
    e = expert.to(tl.int64)
    weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    dgate = tl.zeros((BM,), dtype=tl.float32)
    for group in tl.range(first, last):
        start = token * F + group * B
        at = (e * OWN + group % OWN) * B * B
        own_bias = bias + e * F + group * B
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc_gate = tl.zeros((BM, BN), dtype=tl.float32)
        for n0 in tl.range(0, B, BK):
            n = n0 + tl.arange(0, BK)
            rows, rows_gate = u + start, u_gate + start
            blocks, blocks_gate = right + at, right_gate + at
            value, z = pre_activation(
                rows, rows_gate, used, B, blocks, blocks_gate, own_bias, n, B, False, GATED, HAS_BIAS, BK, PRECISION
            )
            h = activate(z, ACTIVATION)
            if GATED:
                h = h * value
            if BACKWARD:
                dh = rows_times(grad + start, used, B, left + at, n, B, True, BK, PRECISION)
                if NEED_GATES:
                    dgate += tl.sum(h * dh, 1)
                dvalue, dz = slopes(dh * weight, value, z, ACTIVATION, GATED)
                if NEED_OUT:
                    block = matrix_tile(blocks, n, B, unit, B, True)
                    acc = tl.dot(dvalue.to(right.dtype.element_ty), block, acc, input_precision=PRECISION)
                if NEED_OUT_GATE:
                    block = matrix_tile(blocks_gate, n, B, unit, B, True)
                    acc_gate = tl.dot(dz.to(right.dtype.element_ty), block, acc_gate, input_precision=PRECISION)
            else:
                block = matrix_tile(left + at, n, B, unit, B, False)
                acc = tl.dot(h.to(left.dtype.element_ty), block, acc, input_precision=PRECISION)
        if not BACKWARD:
            acc = acc * weight
        at_out = start[:, None] + unit[None, :]
        if NEED_OUT:
            add_rows(out + at_out, acc, inside, choice, TOP_K)
        if NEED_OUT_GATE:
            add_rows(out_gate + at_out, acc_gate, inside, choice, TOP_K)
    end_turn(used, done + turn, TOP_K)
    if NEED_GATES:
        tl.store(at_gate, dgate, mask=has_gate)


@triton.jit
def hidden_blocks_kernel(
    grad,  # [T, F]
    u,  # [T, F]
    u_gate,  # [T, F]
    gates,  # [T, TOP_K]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    dright,  # [EXPERTS, groups, B, B], or for shared blocks [shares, EXPERTS, B, B]: one share of the groups each
    dright_gate,
    dleft,
    dbias,  # [EXPERTS, F]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    F,
    share,  # groups of one program; 1 where they own their blocks
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_RIGHT: tl.constexpr,
    NEED_RIGHT_GATE: tl.constexpr,
    NEED_LEFT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(EXPERTS, shares of the groups, parts of BN x BN of a block)``: groups, choices and slots in order."""
    PARTS: tl.constexpr = (B + BN - 1) // BN
    e = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2) % PARTS * BN + tl.arange(0, BN)
    m = tl.program_id(2) // PARTS * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BN), dtype=tl.float32)
    acc_gate = tl.zeros((BN, BN), dtype=tl.float32)
    acc_left = tl.zeros((BN, BN), dtype=tl.float32)
    first = tl.program_id(1) * share
    for group in tl.range(first, tl.minimum(first + share, F // B)):
        at = (e * OWN + group % OWN) * B * B
        own_bias = bias + e * F + group * B
        total = tl.zeros((BN,), dtype=tl.float32)
        for choice in tl.range(0, TOP_K):
            segment = offsets + choice * (EXPERTS + 1) + e
            high = tl.load(segment + 1)
            for slot in tl.range(tl.load(segment), high, BM):
                place = slot + tl.arange(0, BM)
                used = place < high
                pair = tl.load(pair_of_slot + place, mask=used, other=0)
                weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)
                start = (pair // TOP_K).to(tl.int64) * F + group * B
                rows, rows_gate = u + start, u_gate + start
                blocks, blocks_gate = right + at, right_gate + at
                value, z = pre_activation(
                    rows, rows_gate, used, B, blocks, blocks_gate, own_bias, n, B, False, GATED, HAS_BIAS, BK, PRECISION
                )
                if NEED_LEFT:
                    h = activate(z, ACTIVATION)
                    if GATED:
                        h = h * value
                    h = tl.where(used[:, None], h * weight[:, None], 0.0).to(left.dtype.element_ty)
                    acc_left = tl.dot(
                        tl.trans(h), row_tile(grad + start, used, m, B), acc_left, input_precision=PRECISION
                    )
                if NEED_RIGHT or NEED_RIGHT_GATE or NEED_BIAS:
                    dh = rows_times(grad + start, used, B, left + at, n, B, True, BK, PRECISION) * weight[:, None]
                    dvalue, dz = slopes(dh, value, z, ACTIVATION, GATED)
                    dvalue = tl.where(used[:, None], dvalue, 0.0)
                    dz = tl.where(used[:, None], dz, 0.0)
                    if NEED_RIGHT:
                        inputs = tl.trans(row_tile(rows, used, m, B))
                        acc = tl.dot(inputs, dvalue.to(right.dtype.element_ty), acc, input_precision=PRECISION)
                    if NEED_RIGHT_GATE:
                        inputs = tl.trans(row_tile(rows_gate, used, m, B))
                        acc_gate = tl.dot(inputs, dz.to(right.dtype.element_ty), acc_gate, input_precision=PRECISION)
                    if NEED_BIAS:
                        total += tl.sum(dz, 0)
        if NEED_BIAS:
            stop = tl.where(tl.program_id(2) < PARTS, B, 0)  # only the first part has it
            tl.store(dbias + e * F + group * B + n, total.to(dbias.dtype.element_ty), mask=n < stop)
    block = (tl.program_id(1) * EXPERTS + e if OWN == 1 else e * OWN + first) * B * B
    if NEED_RIGHT:
        inside = (m < B)[:, None] & (n < B)[None, :]
        tl.store(dright + block + m[:, None] * B + n[None, :], acc.to(dright.dtype.element_ty), mask=inside)
    if NEED_RIGHT_GATE:
        inside = (m < B)[:, None] & (n < B)[None, :]
        at_gate = dright_gate + block + m[:, None] * B + n[None, :]
        tl.store(at_gate, acc_gate.to(dright_gate.dtype.element_ty), mask=inside)
    if NEED_LEFT:
        inside = (n < B)[:, None] & (m < B)[None, :]
        tl.store(dleft + block + n[:, None] * B + m[None, :], acc_left.to(dleft.dtype.element_ty), mask=inside)
