"""Kernels of `neuron_experts`: a program has slots of one expert, sorted by expert or, of few
tokens, a pair each.

How arrays are indexed (t: token, j: choice, e: expert, p = t TOP_K + j: pair, s: place of a pair in
the order):

    x[t, i], grad[t, o]         tokens
    gates[p], index[p]          of a pair: weight, expert
    order[e]                    first place of an expert (EXPERTS: none)
    order[EXPERTS + 2 + s]      the pair at a place
    up[e, n, i], gate_up[e, n, i], down[e, n, o], bias[e, n]        n: neuron
    h_rows[s, n], dvalue_rows[s, n], dz_rows[s, n]      by place; where nothing is sorted, by pair
    out[p, c - first]           rows of pairs, which `collect_kernel` adds
                                c: column, from first to last

A row of a product depends on one slot alone, so an Inf or NaN stays with its token; sums over
widths and neurons are made in steps of the same size in every way, so a token's result does not
depend on its batch.
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


@triton.jit
def neurons_fused_kernel(
    x,
    gates,
    order,
    up,
    gate_up,  # or None
    down,
    bias,  # or None
    out,
    width,
    out_width,
    first,
    last,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of the columns)``: rows of pairs, with all neurons of an
    expert on chip.

    Every part of the columns computes the hidden activations.
    """
    expert, _place, pair, used = slots_of_program(order, None, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    share = tl.cdiv(tl.cdiv(last - first, BK), tl.num_programs(1)) * BK
    begin = first + tl.program_id(1) * share
    end = tl.minimum(begin + share, last)
    if expert == EXPERTS:
        for c0 in tl.range(begin, end, BK):
            nothing = tl.zeros((BM, BK), dtype=tl.float32)
            store_rows(out, pair, nothing, used, c0 - first + tl.arange(0, BK), last - first)
        return
    e = expert.to(tl.int64)
    n = tl.arange(0, BN)
    rows = x + pair // TOP_K * width
    h, _value, _z = hidden_units(
        rows,
        rows,
        used,
        width,
        up,
        gate_up,
        e * neurons * width,
        bias,
        e * neurons,
        n,
        neurons,
        ACTIVATION,
        True,
        BK,
        PRECISION,
    )
    h = h.to(down.dtype.element_ty)
    gate = gates_of_pairs(gates, pair, used)[:, None]
    for c0 in tl.range(begin, end, BK):
        c = c0 + tl.arange(0, BK)
        weights = matrix_tile(down + e * neurons * out_width, n, neurons, c, out_width, False)
        o = tl.dot(h, weights, input_precision=PRECISION) * gate
        store_rows(out, pair, o, used, c - first, last - first)


@triton.jit(do_not_specialize=COUNTS)
def neurons_hidden_kernel(
    x,
    grad,  # of a backward, or None
    gates,
    order,  # None: a program has a pair of `index`
    index,
    up,
    gate_up,  # or None
    down,  # or None without grad
    bias,  # or None
    h_rows,
    dvalue_rows,  # with gate_up
    dz_rows,
    gate_parts,  # [parts of the neurons, p] float32: gradients of the gates
    tokens,
    width,
    out_width,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of BN neurons)``: hidden activations; of a backward those
    times the gate, and the gradients of ``x up`` and ``x gate_up``."""
    expert, place, pair, used = slots_of_program(order, index, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    if grad is not None:
        at_gate = gate_parts + tl.program_id(1).to(tl.int64) * tokens * TOP_K + pair
    if expert == EXPERTS:
        if grad is not None:
            tl.store(at_gate, tl.zeros((BM,), dtype=tl.float32), mask=used)
        return
    e = expert.to(tl.int64)
    token = pair // TOP_K
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows = x + token * width
    h, value, z = hidden_units(
        rows,
        rows,
        used,
        width,
        up,
        gate_up,
        e * neurons * width,
        bias,
        e * neurons,
        n,
        neurons,
        ACTIVATION,
        True,
        BK,
        PRECISION,
    )
    if grad is not None:
        gate = gates_of_pairs(gates, pair, used)[:, None]
        weights = down + e * neurons * out_width
        grads = grad + token * out_width
        dh = rows_times(grads, used, out_width, weights, n, neurons, True, BK, PRECISION)
        tl.store(at_gate, tl.sum(h * dh, 1), mask=used)
        dvalue, dz = slopes(dh * gate, value, z, gate_up, ACTIVATION)
        if gate_up is not None:
            store_rows(dvalue_rows, place, dvalue, used, n, neurons)
        store_rows(dz_rows, place, dz, used, n, neurons)
        h = h * gate
    store_rows(h_rows, place, h, used, n, neurons)


@triton.jit
def neurons_rows_kernel(
    rows,  # [s, n]
    more_rows,
    gates,  # None: rows are as they are
    order,  # None: a program has a token, whose pairs are in `index`
    index,
    weights,  # [e, n, c]
    more_weights,  # or None
    out,
    columns,
    first,
    last,
    neurons,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,  # of a token, without an order; 1 with it
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, or tokens; parts of BN columns)``: rows times their experts'
    weights, times the gate; with ``more_weights`` the sum of two such products. A token's rows are
    added in order."""
    tile = tl.program_id(0) * CHOICES
    expert, place, pair, used = slots_of_program(order, index, tile, EXPERTS, SCAN, BM)
    if expert > EXPERTS:
        return
    c = first + tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for choice in tl.range(0, CHOICES):
        if order is None:
            expert, place, pair, used = slots_of_program(
                order, index, tile + choice, EXPERTS, SCAN, BM
            )
        size = tl.where(expert == EXPERTS, 0, neurons)  # no expert: zeros
        at = place * neurons
        at_weights = expert.to(tl.int64) * neurons * columns
        acc = rows_times(
            rows + at, used, size, weights + at_weights, c, columns, False, BK, PRECISION
        )
        if more_weights is not None:
            acc += rows_times(
                more_rows + at,
                used,
                size,
                more_weights + at_weights,
                c,
                columns,
                False,
                BK,
                PRECISION,
            )
        if gates is not None:
            gate = gates_of_pairs(gates, pair, used)[:, None]
            # Of float32 this choice keeps product and sum from becoming one FMA.
            acc = tl.where(expert == EXPERTS, 0.0, acc * gate)
        total += acc.to(out.dtype.element_ty).to(tl.float32)  # rounded as rows of pairs are
    store_rows(out, pair // CHOICES, total, used, c - first, last - first)


@triton.jit
def weight_gradient(
    rows,  # [s, n]
    tokens,  # [t, c]
    pairs,  # [s]
    low,  # the expert's first place
    high,
    out,  # [n, c]
    columns,
    neurons,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The program's ``BM`` neurons and ``BN`` columns of ``rows^T tokens``."""
    parts = (columns + BN - 1) // BN
    first_neuron = tl.program_id(1) // parts * BM
    n = first_neuron + tl.arange(0, BM)
    c = tl.program_id(1) % parts * BN + tl.arange(0, BN)
    if first_neuron < neurons:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for first in tl.range(low, high, BK):
            place = first + tl.arange(0, BK)
            used = place < high
            token = (tl.load(pairs + place, mask=used, other=0) // TOP_K).to(tl.int64)
            row = row_tile(rows + place.to(tl.int64) * neurons, used, n, neurons)
            right = row_tile(tokens + token * columns, used, c, columns)
            acc = tl.dot(tl.trans(row), right, acc, input_precision=PRECISION)
        store_rows(out, n, acc, n < neurons, c, columns)


@triton.jit
def neurons_weights_kernel(
    x,
    grad,
    order,
    h_rows,
    dvalue_rows,
    dz_rows,
    dup,  # as the weights; None: not wanted
    ddown,
    dgate_up,
    dbias,
    width,
    out_width,
    neurons,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(EXPERTS, parts of BM neurons and BN columns, 4)``: gradients of weights, over an
    expert's slots in order; the last axis is up, down, gate_up and bias."""
    e = tl.program_id(0).to(tl.int64)
    low = tl.load(order + e)
    high = tl.load(order + e + 1)
    pairs = order + EXPERTS + 2
    which = tl.program_id(2)
    if which == 0:
        if dup is not None:
            to = dup + e * neurons * width
            weight_gradient(
                dvalue_rows, x, pairs, low, high, to, width, neurons, TOP_K, PRECISION, BM, BN, BK
            )
    elif which == 1:
        if ddown is not None:
            to = ddown + e * neurons * out_width
            weight_gradient(
                h_rows, grad, pairs, low, high, to, out_width, neurons, TOP_K, PRECISION, BM, BN, BK
            )
    elif which == 2:
        if dgate_up is not None:
            to = dgate_up + e * neurons * width
            weight_gradient(
                dz_rows, x, pairs, low, high, to, width, neurons, TOP_K, PRECISION, BM, BN, BK
            )
    elif dbias is not None:
        first_neuron = tl.program_id(1) * BM
        n = first_neuron + tl.arange(0, BM)
        if first_neuron < neurons:
            total = tl.zeros((BM,), dtype=tl.float32)
            for first in tl.range(low, high, BK):
                place = first + tl.arange(0, BK)
                row = row_tile(dz_rows + place.to(tl.int64) * neurons, place < high, n, neurons)
                total += tl.sum(row.to(tl.float32), 0)
            tl.store(dbias + e * neurons + n, total.to(dbias.dtype.element_ty), mask=n < neurons)
