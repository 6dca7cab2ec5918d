"""Kernels of `neuron_experts` over slots sorted by expert: a program has slots of one expert.

A row of a product depends on one slot alone, so an Inf or NaN stays with its token.
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
def neurons_fused_kernel(
    x,  # [T, width]
    gates,  # [T, TOP_K]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    up,  # [EXPERTS, neurons, width]
    gate_up,
    down,  # [EXPERTS, neurons, out_width]
    bias,  # [EXPERTS, neurons]
    out,  # [T, out_width]
    tickets,  # [parts of the columns], as done
    done,
    tokens,
    width,
    out_width,
    columns,  # of one program
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of the columns)``: every token's sum over its experts, with all neurons of one
    on chip.

    Every part of the columns computes the hidden activations.
    """
    turn = done + tl.program_id(1)
    tile = next_tile(tickets + tl.program_id(1), TOP_K)
    choice, expert, place, used = expert_tile(offsets, tile, TOP_K, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    pair = tl.load(pair_of_slot + place, mask=used, other=0)
    token = (pair // TOP_K).to(tl.int64)
    results = out + token * out_width
    first = tl.program_id(1) * columns
    last = tl.minimum(first + columns, out_width)
    if expert == EXPERTS:
        wait_for_turn(choice, tokens, turn, TOP_K)
        for c0 in tl.range(first, last, BK):
            no_rows(results, used, choice, c0 + tl.arange(0, BK), out_width)
        end_turn(used, turn, TOP_K)
        return
    e = expert.to(tl.int64)
    n = tl.arange(0, BN)
    own_up, own_gate, own_bias = up + e * neurons * width, gate_up + e * neurons * width, bias + e * neurons
    rows = x + token * width
    value, z = pre_activation(
        rows, rows, used, width, own_up, own_gate, own_bias, n, neurons, True, GATED, HAS_BIAS, BK, PRECISION
    )
    h = activate(z, ACTIVATION)
    if GATED:
        h = h * value
    h = h.to(down.dtype.element_ty)
    gate = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    own = down + e * neurons * out_width
    wait_for_turn(choice, tokens, turn, TOP_K)
    for c0 in tl.range(first, last, BK):
        c = c0 + tl.arange(0, BK)
        weights = matrix_tile(own, n, neurons, c, out_width, False)
        o = tl.dot(h, weights, input_precision=PRECISION) * gate
        mask = used[:, None] & (c < out_width)[None, :]
        add_rows(results[:, None] + c[None, :], o, mask, choice, TOP_K)
    end_turn(used, turn, TOP_K)


@triton.jit
def neurons_hidden_kernel(
    x,  # [T, width]
    grad,  # [T, out_width]
    gates,  # [T, TOP_K]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    up,  # [EXPERTS, neurons, width]
    gate_up,
    down,  # [EXPERTS, neurons, out_width]
    bias,  # [EXPERTS, neurons]
    h_rows,  # [T TOP_K, neurons], by slot: h times the gate
    dvalue_rows,  # the gradients of x up
    dz_rows,  # and of x gate_up
    gate_parts,  # [parts, T TOP_K] float32: gradients of the gates
    tokens,
    width,
    out_width,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of BN neurons)``: the hidden activations of every slot, or their gradients."""
    _choice, expert, place, used = expert_tile(offsets, tl.program_id(0), TOP_K, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    pair = tl.load(pair_of_slot + place, mask=used, other=0)
    at_gate = gate_parts + tl.program_id(1).to(tl.int64) * tokens * TOP_K + pair
    if expert == EXPERTS:
        if BACKWARD:
            tl.store(at_gate, tl.zeros((BM,), dtype=tl.float32), mask=used)
        return
    e = expert.to(tl.int64)
    token = (pair // TOP_K).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    own_up, own_gate, own_bias = up + e * neurons * width, gate_up + e * neurons * width, bias + e * neurons
    rows = x + token * width
    value, z = pre_activation(
        rows, rows, used, width, own_up, own_gate, own_bias, n, neurons, True, GATED, HAS_BIAS, BK, PRECISION
    )
    h = activate(z, ACTIVATION)
    if GATED:
        h = h * value
    at_out = place.to(tl.int64)[:, None] * neurons + n[None, :]
    known = used[:, None] & (n < neurons)[None, :]
    weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)[:, None]
    if BACKWARD:
        own_down = down + e * neurons * out_width
        dh = rows_times(grad + token * out_width, used, out_width, own_down, n, neurons, True, BK, PRECISION)
        tl.store(at_gate, tl.sum(h * dh, 1), mask=used)
        dvalue, dz = slopes(dh * weight, value, z, ACTIVATION, GATED)
        if GATED:
            tl.store(dvalue_rows + at_out, dvalue.to(dvalue_rows.dtype.element_ty), mask=known)
        tl.store(dz_rows + at_out, dz.to(dz_rows.dtype.element_ty), mask=known)
    tl.store(h_rows + at_out, (h * weight).to(h_rows.dtype.element_ty), mask=known)


@triton.jit
def neurons_rows_kernel(
    rows,  # [T TOP_K, neurons], by slot
    more_rows,
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    weights,  # [EXPERTS, neurons, columns]
    more_weights,
    out,  # [T, columns]
    tickets,  # [parts of the columns], as done
    done,
    tokens,
    columns,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of BN columns)``: every token's sum of its slots' rows times their experts'
    weights; GATED: of two such products."""
    turn = done + tl.program_id(1)
    tile = next_tile(tickets + tl.program_id(1), TOP_K)
    choice, expert, place, used = expert_tile(offsets, tile, TOP_K, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    token = (tl.load(pair_of_slot + place, mask=used, other=0) // TOP_K).to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    results = out + token * columns
    if expert == EXPERTS:
        wait_for_turn(choice, tokens, turn, TOP_K)
        no_rows(results, used, choice, c, columns)
        end_turn(used, turn, TOP_K)
        return
    at = place.to(tl.int64) * neurons
    own = expert.to(tl.int64) * neurons * columns
    acc = rows_times(rows + at, used, neurons, weights + own, c, columns, False, BK, PRECISION)
    if GATED:
        acc += rows_times(more_rows + at, used, neurons, more_weights + own, c, columns, False, BK, PRECISION)
    wait_for_turn(choice, tokens, turn, TOP_K)
    mask = used[:, None] & (c < columns)[None, :]
    add_rows(results[:, None] + c[None, :], acc, mask, choice, TOP_K)
    end_turn(used, turn, TOP_K)


@triton.jit
def weight_gradient(
    rows,  # [T TOP_K, neurons], by slot
    tokens,  # [T, columns]
    pair_of_slot,
    offsets,  # from the expert's on
    out,  # of the expert, [neurons, columns]
    columns,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The program's ``BM`` neurons and ``BN`` columns of ``rows^T tokens``."""
    parts = (columns + BN - 1) // BN
    n = tl.program_id(1) // parts * BM + tl.arange(0, BM)
    c = tl.program_id(1) % parts * BN + tl.arange(0, BN)
    if tl.program_id(1) // parts * BM < neurons:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for choice in tl.range(0, TOP_K):
            high = tl.load(offsets + choice * (EXPERTS + 1) + 1)
            for first in tl.range(tl.load(offsets + choice * (EXPERTS + 1)), high, BK):
                place = first + tl.arange(0, BK)
                used = place < high
                token = (tl.load(pair_of_slot + place, mask=used, other=0) // TOP_K).to(tl.int64)
                row = row_tile(rows + place.to(tl.int64) * neurons, used, n, neurons)
                right = row_tile(tokens + token * columns, used, c, columns)
                acc = tl.dot(tl.trans(row), right, acc, input_precision=PRECISION)
        where = out + n[:, None] * columns + c[None, :]
        tl.store(where, acc.to(out.dtype.element_ty), mask=(n < neurons)[:, None] & (c < columns)[None, :])


@triton.jit
def neurons_weights_kernel(
    x,  # [T, width]
    grad,  # [T, out_width]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [TOP_K (EXPERTS + 1) + 1]
    h_rows,  # [T TOP_K, neurons], by slot
    dvalue_rows,
    dz_rows,
    dup,  # [EXPERTS, neurons, width]
    ddown,  # [EXPERTS, neurons, out_width]
    dgate_up,  # [EXPERTS, neurons, width]
    dbias,  # [EXPERTS, neurons]
    width,
    out_width,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NEED_UP: tl.constexpr,
    NEED_DOWN: tl.constexpr,
    NEED_GATE_UP: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(EXPERTS, parts of BM neurons and BN columns, 4)``: gradients of weights, over an expert's slots in
    order of choices and tokens; the last axis is up, down, gate_up and bias."""
    e = tl.program_id(0).to(tl.int64)
    own = offsets + e
    which = tl.program_id(2)
    if which == 0:
        if NEED_UP:
            to = dup + e * neurons * width
            weight_gradient(
                dvalue_rows, x, pair_of_slot, own, to, width, neurons, EXPERTS, TOP_K, PRECISION, BM, BN, BK
            )
    elif which == 1:
        if NEED_DOWN:
            to = ddown + e * neurons * out_width
            weight_gradient(
                h_rows, grad, pair_of_slot, own, to, out_width, neurons, EXPERTS, TOP_K, PRECISION, BM, BN, BK
            )
    elif which == 2:
        if NEED_GATE_UP:
            to = dgate_up + e * neurons * width
            weight_gradient(dz_rows, x, pair_of_slot, own, to, width, neurons, EXPERTS, TOP_K, PRECISION, BM, BN, BK)
    elif NEED_BIAS:
        n = tl.program_id(1) * BM + tl.arange(0, BM)
        if tl.program_id(1) * BM < neurons:
            total = tl.zeros((BM,), dtype=tl.float32)
            for choice in tl.range(0, TOP_K):
                high = tl.load(own + choice * (EXPERTS + 1) + 1)
                for first in tl.range(tl.load(own + choice * (EXPERTS + 1)), high, BK):
                    place = first + tl.arange(0, BK)
                    row = row_tile(dz_rows + place.to(tl.int64) * neurons, place < high, n, neurons)
                    total += tl.sum(row.to(tl.float32), 0)
            tl.store(dbias + e * neurons + n, total.to(dbias.dtype.element_ty), mask=n < neurons)
