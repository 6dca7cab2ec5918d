"""Gradients of the blocks and biases, over slots sorted by expert, and the sums of partial results."""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.hidden_experts.triton.hidden_tiles import pre_activation, row_tile, slopes, times
from mpoe_kernels.triton.device_functions import activate


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


@triton.jit
def sum_of_parts(parts, out, count, size, BLOCK: tl.constexpr):
    """``out[i] = sum_p parts[p, i]``, a program for each ``BLOCK`` of ``size``."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK < size:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        at = parts + i
        for _ in tl.range(0, count):
            total += tl.load(at, mask=i < size, other=0.0)
            at += size
        tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit
def hidden_sums_kernel(
    gate_parts,  # [groups, gate_size] float32
    right_parts,  # [shares, right_size] float32, and so on
    right_gate_parts,
    left_parts,
    dgates,
    dright,
    dright_gate,
    dleft,
    groups,
    shares,
    gate_size,
    right_size,
    right_gate_size,
    left_size,
    BLOCK: tl.constexpr,
):
    """Grid ``(blocks of the largest, 4)``: sums of parts in order. Gradients without parts have size 0."""
    which = tl.program_id(1)
    if which == 0:
        sum_of_parts(gate_parts, dgates, groups, gate_size, BLOCK)
    elif which == 1:
        sum_of_parts(right_parts, dright, shares, right_size, BLOCK)
    elif which == 2:
        sum_of_parts(right_gate_parts, dright_gate, shares, right_gate_size, BLOCK)
    else:
        sum_of_parts(left_parts, dleft, shares, left_size, BLOCK)
