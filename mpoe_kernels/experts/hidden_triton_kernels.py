"""Kernels of `hidden_experts`: a program has slots of one expert and some groups of units; slots
are sorted by expert or, of few tokens, a pair each.

How arrays are indexed (t: token, j: choice, e: expert, p = t TOP_K + j: pair, g: group, f = g B +
b: hidden unit):

    u[t, f], u_gate[t, f], grad[t, f]           tokens
    gates[p], index[p]                          of a pair: weight, expert
    order[e]                                    first place of an expert (EXPERTS: none)
    order[EXPERTS + 2 + s]                      the pair at a place
    right[e, g % OWN, b, b'], right_gate, left  blocks; OWN: groups that own some, 1 if they share
    bias[e, f]
    out[p, f - first B], out_gate               rows of pairs, which `sum_choices_kernel` adds

A row of a product depends on one slot alone, so an Inf or NaN stays with its token. Blocks of more
than ``BN`` units are computed in parts, each of which recomputes the hidden activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import (
    COUNTS,
    activate,
    matrix_tile,
    pre_activation,
    row_tile,
    rows_times,
    slopes,
    slots_of_program,
    store_rows,
)


@triton.jit(do_not_specialize=COUNTS)
def hidden_rows_kernel(
    grad,
    u,
    u_gate,
    gates,
    order,  # None: a program has a pair of `index`
    index,
    right,
    right_gate,
    left,
    bias,
    out,  # o, or du of a backward
    out_gate,  # du_gate
    gate_parts,  # [shares of all groups, p] float32: gradients of the gates
    tokens,
    F,
    first,  # groups from first to last
    last,
    share,  # of one program
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
    """Grid ``(tiles of BM slots, shares of the groups, parts of BN of a group's units)``. Of a
    group's parts, the first one also computes the gates' gradients."""
    expert, place, pair, used = slots_of_program(order, index, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    unit = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = used[:, None] & (unit < B)[None, :]
    size = (last - first) * B
    if NEED_GATES:
        shares = (first // share + tl.program_id(1)).to(tl.int64)
        at_gate = gate_parts + shares * tokens * TOP_K + pair
        has_gate = used & (place < tl.where(tl.program_id(2) == 0, tokens * TOP_K, 0))
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, last)
    if expert == EXPERTS:
        for group in tl.range(begin, end):
            at_out = pair[:, None] * size + ((group - first) * B + unit)[None, :]
            nothing = tl.zeros((BM, BN), dtype=out.dtype.element_ty)
            if NEED_OUT:
                tl.store(out + at_out, nothing, mask=inside)
            if NEED_OUT_GATE:
                tl.store(out_gate + at_out, nothing, mask=inside)
        if NEED_GATES:
            tl.store(at_gate, tl.zeros((BM,), dtype=tl.float32), mask=has_gate)
        return
    e = expert.to(tl.int64)
    weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    dgate = tl.zeros((BM,), dtype=tl.float32)
    for group in tl.range(begin, end):
        start = pair // TOP_K * F + group * B
        at = (e * OWN + group % OWN) * B * B
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc_gate = tl.zeros((BM, BN), dtype=tl.float32)
        for n0 in tl.range(0, B, BK):
            n = n0 + tl.arange(0, BK)
            value, z = pre_activation(
                u + start,
                u_gate + start,
                used,
                B,
                right + at,
                right_gate + at,
                bias + e * F + group * B,
                n,
                B,
                False,
                GATED,
                HAS_BIAS,
                BK,
                PRECISION,
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
                    block = matrix_tile(right + at, n, B, unit, B, True)
                    acc = tl.dot(
                        dvalue.to(right.dtype.element_ty), block, acc, input_precision=PRECISION
                    )
                if NEED_OUT_GATE:
                    block = matrix_tile(right_gate + at, n, B, unit, B, True)
                    acc_gate = tl.dot(
                        dz.to(right.dtype.element_ty), block, acc_gate, input_precision=PRECISION
                    )
            else:
                block = matrix_tile(left + at, n, B, unit, B, False)
                acc = tl.dot(h.to(left.dtype.element_ty), block, acc, input_precision=PRECISION)
        if not BACKWARD:
            acc = acc * weight
        at_out = pair[:, None] * size + ((group - first) * B + unit)[None, :]
        if NEED_OUT:
            tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=inside)
        if NEED_OUT_GATE:
            tl.store(out_gate + at_out, acc_gate.to(out_gate.dtype.element_ty), mask=inside)
    if NEED_GATES:
        tl.store(at_gate, dgate, mask=has_gate)


@triton.jit
def hidden_blocks_kernel(
    grad,
    u,
    u_gate,
    gates,
    order,
    right,
    right_gate,
    left,
    bias,
    # as the blocks, or of shared ones [shares, EXPERTS, B, B]: one share of the groups each
    dright,
    dright_gate,
    dleft,
    dbias,
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
    """Grid ``(EXPERTS, shares of the groups, parts of BN x BN of a block)``: groups and slots in
    order."""
    PARTS: tl.constexpr = (B + BN - 1) // BN
    e = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2) % PARTS * BN + tl.arange(0, BN)
    m = tl.program_id(2) // PARTS * BN + tl.arange(0, BN)
    acc = tl.zeros((BN, BN), dtype=tl.float32)
    acc_gate = tl.zeros((BN, BN), dtype=tl.float32)
    acc_left = tl.zeros((BN, BN), dtype=tl.float32)
    first = tl.program_id(1) * share
    low = tl.load(order + e)
    high = tl.load(order + e + 1)
    for group in tl.range(first, tl.minimum(first + share, F // B)):
        at = (e * OWN + group % OWN) * B * B
        own_bias = bias + e * F + group * B
        total = tl.zeros((BN,), dtype=tl.float32)
        for slot in tl.range(low, high, BM):
            place = slot + tl.arange(0, BM)
            used = place < high
            pair = tl.load(order + EXPERTS + 2 + place, mask=used, other=0)
            weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)
            start = (pair // TOP_K).to(tl.int64) * F + group * B
            rows = u + start
            rows_gate = u_gate + start
            blocks = right + at
            blocks_gate = right_gate + at
            value, z = pre_activation(
                rows,
                rows_gate,
                used,
                B,
                blocks,
                blocks_gate,
                own_bias,
                n,
                B,
                False,
                GATED,
                HAS_BIAS,
                BK,
                PRECISION,
            )
            if NEED_LEFT:
                h = activate(z, ACTIVATION)
                if GATED:
                    h = h * value
                h = tl.where(used[:, None], h * weight[:, None], 0.0).to(left.dtype.element_ty)
                acc_left = tl.dot(
                    tl.trans(h),
                    row_tile(grad + start, used, m, B),
                    acc_left,
                    input_precision=PRECISION,
                )
            if NEED_RIGHT or NEED_RIGHT_GATE or NEED_BIAS:
                dh = (
                    rows_times(grad + start, used, B, left + at, n, B, True, BK, PRECISION)
                    * weight[:, None]
                )
                dvalue, dz = slopes(dh, value, z, ACTIVATION, GATED)
                dvalue = tl.where(used[:, None], dvalue, 0.0)
                dz = tl.where(used[:, None], dz, 0.0)
                if NEED_RIGHT:
                    inputs = tl.trans(row_tile(rows, used, m, B))
                    acc = tl.dot(
                        inputs, dvalue.to(right.dtype.element_ty), acc, input_precision=PRECISION
                    )
                if NEED_RIGHT_GATE:
                    inputs = tl.trans(row_tile(rows_gate, used, m, B))
                    acc_gate = tl.dot(
                        inputs, dz.to(right.dtype.element_ty), acc_gate, input_precision=PRECISION
                    )
                if NEED_BIAS:
                    total += tl.sum(dz, 0)
        if NEED_BIAS:
            stop = tl.where(tl.program_id(2) < PARTS, B, 0)  # only the first part has it
            tl.store(dbias + e * F + group * B + n, total.to(dbias.dtype.element_ty), mask=n < stop)
    block = (tl.program_id(1) * EXPERTS + e if OWN == 1 else e * OWN + first) * B * B
    if NEED_RIGHT:
        store_rows(dright + block, m, acc, m < B, n, B)
    if NEED_RIGHT_GATE:
        store_rows(dright_gate + block, m, acc_gate, m < B, n, B)
    if NEED_LEFT:
        store_rows(dleft + block, n, acc_left, n < B, m, B)
