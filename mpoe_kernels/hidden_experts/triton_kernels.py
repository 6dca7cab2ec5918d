"""Kernels of `hidden_experts` over slots sorted by expert: a program has slots of one expert and some groups of units.

A row of a product depends on one slot alone, so an Inf or NaN stays with its token. Blocks of more than ``BN`` units
are computed in parts, each of which recomputes the hidden activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import activate, activation_slope, expert_tile


@triton.jit
def block_tile(block, row, column, B: tl.constexpr):
    """``block[row, column]`` of a ``[B, B]`` block, zero outside."""
    inside = (row < B)[:, None] & (column < B)[None, :]
    return tl.load(block + row[:, None] * B + column[None, :], mask=inside, other=0.0)


@triton.jit
def row_tile(rows, used, unit, B: tl.constexpr):
    """Hidden units of one group, with ``rows`` pointing at the first; zero where not ``used``, whatever memory
    contains."""
    return tl.load(rows[:, None] + unit[None, :], mask=used[:, None] & (unit < B)[None, :], other=0.0)


@triton.jit
def times(rows, used, block, n, B: tl.constexpr, TRANSPOSED: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """Columns ``n`` of ``rows @ block`` (of its transpose), in float32."""
    acc = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, B, BK):
        k = k0 + tl.arange(0, BK)
        tile = tl.trans(block_tile(block, n, k, B)) if TRANSPOSED else block_tile(block, k, n, B)
        acc = tl.dot(row_tile(rows, used, k, B), tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pre_activation(
    rows,  # of u
    rows_gate,  # of u_gate
    used,
    right,
    right_gate,
    bias,  # of this expert and group
    n,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    B: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(value, z)``: u R and the input of the activation; without a gate they differ only by the bias."""
    value = times(rows, used, right, n, B, False, BK, PRECISION)
    z = value
    if GATED:
        z = times(rows_gate, used, right_gate, n, B, False, BK, PRECISION)
    if HAS_BIAS:
        z += tl.load(bias + n, mask=n < B, other=0.0).to(tl.float32)[None, :]
    return value, z


@triton.jit
def hidden_forward_kernel(
    u,  # [T, F]
    u_gate,  # [T, F]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [EXPERTS + 1]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    out,  # [T TOP_K, F], by slot
    F,
    share,  # groups of one program
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, shares of the groups, parts of BN of a group's units)``: ``h L`` of every slot."""
    expert, place, used = expert_tile(offsets, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert == EXPERTS:
        return
    e = expert.to(tl.int64)
    token = (tl.load(pair_of_slot + place, mask=used, other=0) // TOP_K).to(tl.int64)
    unit = tl.program_id(2) * BN + tl.arange(0, BN)
    first = tl.program_id(1) * share
    for group in tl.range(first, tl.minimum(first + share, F // B)):
        start = token * F + group * B
        at = (e * OWN + group % OWN) * B * B
        own_bias = bias + e * F + group * B
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for n0 in tl.range(0, B, BK):
            n = n0 + tl.arange(0, BK)
            rows, rows_gate = u + start, u_gate + start
            blocks, blocks_gate = right + at, right_gate + at
            value, z = pre_activation(
                rows, rows_gate, used, blocks, blocks_gate, own_bias, n, GATED, HAS_BIAS, B, BK, PRECISION
            )
            h = activate(z, ACTIVATION)
            if GATED:
                h = h * value
            tile = block_tile(left + at, n, unit, B)
            acc = tl.dot(h.to(left.dtype.element_ty), tile, acc, input_precision=PRECISION)
        at_out = out + (place.to(tl.int64) * F + group * B)[:, None] + unit[None, :]
        tl.store(at_out, acc.to(out.dtype.element_ty), mask=used[:, None] & (unit < B)[None, :])


@triton.jit
def slopes(dh, value, z, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """``(dvalue, dz)`` from the gradient of the hidden activation."""
    dz = dh
    if GATED:
        dz = dh * value
    if ACTIVATION != "none":
        dz = dz * activation_slope(z, ACTIVATION)
    dvalue = dz
    if GATED:
        dvalue = dh * activate(z, ACTIVATION)
    return dvalue, dz


@triton.jit
def hidden_rows_kernel(
    grad,  # [T, F]
    u,  # [T, F]
    u_gate,  # [T, F]
    gates,  # [T, TOP_K]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [EXPERTS + 1]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    du,  # [T TOP_K, F], by slot
    du_gate,
    gate_parts,  # [shares, T TOP_K] float32: gradients of the slots' gates
    slots,
    F,
    share,  # groups of one program
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_U: tl.constexpr,
    NEED_U_GATE: tl.constexpr,
    NEED_GATES: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid as the forward's. Of a group's parts, the first one also computes the gates' gradients."""
    expert, place, used = expert_tile(offsets, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert == EXPERTS:
        return
    e = expert.to(tl.int64)
    pair = tl.load(pair_of_slot + place, mask=used, other=0)
    weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    token = (pair // TOP_K).to(tl.int64)
    unit = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = used[:, None] & (unit < B)[None, :]
    dgate = tl.zeros((BM,), dtype=tl.float32)
    first = tl.program_id(1) * share
    for group in tl.range(first, tl.minimum(first + share, F // B)):
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
                rows, rows_gate, used, blocks, blocks_gate, own_bias, n, GATED, HAS_BIAS, B, BK, PRECISION
            )
            dh = times(grad + start, used, left + at, n, B, True, BK, PRECISION)
            if NEED_GATES:
                h = activate(z, ACTIVATION)
                if GATED:
                    h = h * value
                dgate += tl.sum(h * dh, 1)
            dvalue, dz = slopes(dh * weight, value, z, ACTIVATION, GATED)
            if NEED_U:
                tile = tl.trans(block_tile(blocks, unit, n, B))
                acc = tl.dot(dvalue.to(right.dtype.element_ty), tile, acc, input_precision=PRECISION)
            if NEED_U_GATE:
                tile = tl.trans(block_tile(blocks_gate, unit, n, B))
                acc_gate = tl.dot(dz.to(right.dtype.element_ty), tile, acc_gate, input_precision=PRECISION)
        at_out = (place.to(tl.int64) * F + group * B)[:, None] + unit[None, :]
        if NEED_U:
            tl.store(du + at_out, acc.to(du.dtype.element_ty), mask=inside)
        if NEED_U_GATE:
            tl.store(du_gate + at_out, acc_gate.to(du_gate.dtype.element_ty), mask=inside)
    if NEED_GATES:
        at_gate = gate_parts + tl.program_id(1).to(tl.int64) * slots + place
        tl.store(at_gate, dgate, mask=used & (place < tl.where(tl.program_id(2) == 0, slots, 0)))


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
    offsets,  # [EXPERTS + 1]
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
    """Grid ``(EXPERTS, shares of the groups, parts of BN x BN of a block)``: slots in order, group after group."""
    PARTS: tl.constexpr = (B + BN - 1) // BN
    e = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2) % PARTS * BN + tl.arange(0, BN)
    m = tl.program_id(2) // PARTS * BN + tl.arange(0, BN)
    lo = tl.load(offsets + e)
    hi = tl.load(offsets + e + 1)
    acc = tl.zeros((BN, BN), dtype=tl.float32)
    acc_gate = tl.zeros((BN, BN), dtype=tl.float32)
    acc_left = tl.zeros((BN, BN), dtype=tl.float32)
    first = tl.program_id(1) * share
    for group in tl.range(first, tl.minimum(first + share, F // B)):
        at = (e * OWN + group % OWN) * B * B
        own_bias = bias + e * F + group * B
        total = tl.zeros((BN,), dtype=tl.float32)
        for slot in tl.range(lo, hi, BM):
            place = slot + tl.arange(0, BM)
            used = place < hi
            pair = tl.load(pair_of_slot + place, mask=used, other=0)
            weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)
            start = (pair // TOP_K).to(tl.int64) * F + group * B
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
            if NEED_LEFT:
                h = activate(z, ACTIVATION)
                if GATED:
                    h = h * value
                h = tl.where(used[:, None], h * weight[:, None], 0.0).to(left.dtype.element_ty)
                acc_left = tl.dot(tl.trans(h), row_tile(grad + start, used, m, B), acc_left, input_precision=PRECISION)
            if NEED_RIGHT or NEED_RIGHT_GATE or NEED_BIAS:
                dh = times(grad + start, used, left + at, n, B, True, BK, PRECISION) * weight[:, None]
                dvalue, dz = slopes(dh, value, z, ACTIVATION, GATED)
                dvalue = tl.where(used[:, None], dvalue, 0.0)
                dz = tl.where(used[:, None], dz, 0.0)
                if NEED_RIGHT:
                    rows = tl.trans(row_tile(u + start, used, m, B))
                    acc = tl.dot(rows, dvalue.to(right.dtype.element_ty), acc, input_precision=PRECISION)
                if NEED_RIGHT_GATE:
                    rows = tl.trans(row_tile(u_gate + start, used, m, B))
                    acc_gate = tl.dot(rows, dz.to(right.dtype.element_ty), acc_gate, input_precision=PRECISION)
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
