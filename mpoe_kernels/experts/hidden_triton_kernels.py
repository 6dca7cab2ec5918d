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
    out[p, f - first B], out_gate               rows of pairs, which `collect_kernel` adds

A row of a product depends on one slot alone, so an Inf or NaN stays with its token. Blocks of more
than ``BN`` units are computed in parts, each of which recomputes the hidden activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import (
    COUNTS,
    gates_of_pairs,
    hidden_units,
    matrix_tile,
    row_tile,
    rows_times,
    slopes,
    slots_of_program,
    store_rows,
)


@triton.jit(do_not_specialize=COUNTS)
def hidden_rows_kernel(
    grad,  # of a backward, or None
    u,
    u_gate,  # or None
    gates,
    order,  # None: a program has a pair of `index`
    index,
    right,
    right_gate,  # or None
    left,
    bias,  # or None
    out,  # o, or du of a backward, or None
    out_gate,  # du_gate, or None
    gate_parts,  # [shares of all groups, p] float32: gradients of the gates, or None
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
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, shares of the groups, parts of BN of a group's units)``. Of a
    group's parts, the first one also computes the gates' gradients."""
    expert, place, pair, used = slots_of_program(order, index, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    unit = tl.program_id(2) * BN + tl.arange(0, BN)
    inside = used[:, None] & (unit < B)[None, :]
    size = (last - first) * B
    if gate_parts is not None:
        shares = (first // share + tl.program_id(1)).to(tl.int64)
        at_gate = gate_parts + shares * tokens * TOP_K + pair
        has_gate = used & (place < tl.where(tl.program_id(2) == 0, tokens * TOP_K, 0))
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, last)
    if expert == EXPERTS:
        for group in tl.range(begin, end):
            at_out = pair[:, None] * size + ((group - first) * B + unit)[None, :]
            nothing = tl.zeros((BM, BN), dtype=u.dtype.element_ty)
            if out is not None:
                tl.store(out + at_out, nothing, mask=inside)
            if out_gate is not None:
                tl.store(out_gate + at_out, nothing, mask=inside)
        if gate_parts is not None:
            tl.store(at_gate, tl.zeros((BM,), dtype=tl.float32), mask=has_gate)
        return
    e = expert.to(tl.int64)
    weight = gates_of_pairs(gates, pair, used)[:, None]
    dgate = tl.zeros((BM,), dtype=tl.float32)
    for group in tl.range(begin, end):
        start = pair // TOP_K * F + group * B
        rows = u + start
        rows_gate = rows
        if u_gate is not None:
            rows_gate = u_gate + start
        at = (e * OWN + group % OWN) * B * B
        at_bias = e * F + group * B
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        acc_gate = tl.zeros((BM, BN), dtype=tl.float32)
        for n0 in tl.range(0, B, BK):
            n = n0 + tl.arange(0, BK)
            h, value, z = hidden_units(
                rows,
                rows_gate,
                used,
                B,
                right,
                right_gate,
                at,
                bias,
                at_bias,
                n,
                B,
                ACTIVATION,
                False,
                BK,
                PRECISION,
            )
            if grad is None:
                block = matrix_tile(left + at, n, B, unit, B, False)
                acc = tl.dot(h.to(left.dtype.element_ty), block, acc, input_precision=PRECISION)
            else:
                dh = rows_times(grad + start, used, B, left + at, n, B, True, BK, PRECISION)
                if gate_parts is not None:
                    dgate += tl.sum(h * dh, 1)
                dvalue, dz = slopes(dh * weight, value, z, right_gate, ACTIVATION)
                if out is not None:
                    block = matrix_tile(right + at, n, B, unit, B, True)
                    dvalue = dvalue.to(right.dtype.element_ty)
                    acc = tl.dot(dvalue, block, acc, input_precision=PRECISION)
                if out_gate is not None:
                    block = matrix_tile(right_gate + at, n, B, unit, B, True)
                    dz = dz.to(right.dtype.element_ty)
                    acc_gate = tl.dot(dz, block, acc_gate, input_precision=PRECISION)
        if grad is None:
            acc = acc * weight
        at_out = pair[:, None] * size + ((group - first) * B + unit)[None, :]
        if out is not None:
            tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=inside)
        if out_gate is not None:
            tl.store(out_gate + at_out, acc_gate.to(out_gate.dtype.element_ty), mask=inside)
    if gate_parts is not None:
        tl.store(at_gate, dgate, mask=has_gate)


@triton.jit
def hidden_blocks_kernel(
    grad,
    u,
    u_gate,  # or None
    gates,
    order,
    right,
    right_gate,  # or None
    left,
    bias,  # or None
    # as the blocks, or of shared ones [shares, EXPERTS, B, B]: one share of the groups each; None:
    # not wanted
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
        at_bias = e * F + group * B
        total = tl.zeros((BN,), dtype=tl.float32)
        for slot in tl.range(low, high, BM):
            place = slot + tl.arange(0, BM)
            used = place < high
            pair = tl.load(order + EXPERTS + 2 + place, mask=used, other=0)
            weight = gates_of_pairs(gates, pair, used)[:, None]
            start = (pair // TOP_K).to(tl.int64) * F + group * B
            rows = u + start
            rows_gate = rows
            if u_gate is not None:
                rows_gate = u_gate + start
            h, value, z = hidden_units(
                rows,
                rows_gate,
                used,
                B,
                right,
                right_gate,
                at,
                bias,
                at_bias,
                n,
                B,
                ACTIVATION,
                False,
                BK,
                PRECISION,
            )
            if dleft is not None:
                h = tl.where(used[:, None], h * weight, 0.0).to(left.dtype.element_ty)
                rows_out = row_tile(grad + start, used, m, B)
                acc_left = tl.dot(tl.trans(h), rows_out, acc_left, input_precision=PRECISION)
            if dright is not None or dright_gate is not None or dbias is not None:
                dh = rows_times(grad + start, used, B, left + at, n, B, True, BK, PRECISION)
                dvalue, dz = slopes(dh * weight, value, z, right_gate, ACTIVATION)
                dvalue = tl.where(used[:, None], dvalue, 0.0)
                dz = tl.where(used[:, None], dz, 0.0)
                if dright is not None:
                    inputs = tl.trans(row_tile(rows, used, m, B))
                    dvalue = dvalue.to(right.dtype.element_ty)
                    acc = tl.dot(inputs, dvalue, acc, input_precision=PRECISION)
                if dright_gate is not None:
                    inputs = tl.trans(row_tile(rows_gate, used, m, B))
                    of_gate = dz.to(right.dtype.element_ty)
                    acc_gate = tl.dot(inputs, of_gate, acc_gate, input_precision=PRECISION)
                if dbias is not None:
                    total += tl.sum(dz, 0)
        if dbias is not None:
            stop = tl.where(tl.program_id(2) < PARTS, B, 0)  # only the first part has it
            tl.store(dbias + at_bias + n, total.to(dbias.dtype.element_ty), mask=n < stop)
    block = (tl.program_id(1) * EXPERTS + e if OWN == 1 else e * OWN + first) * B * B
    if dright is not None:
        store_rows(dright + block, m, acc, m < B, n, B)
    if dright_gate is not None:
        store_rows(dright_gate + block, m, acc_gate, m < B, n, B)
    if dleft is not None:
        store_rows(dleft + block, n, acc_left, n < B, m, B)
