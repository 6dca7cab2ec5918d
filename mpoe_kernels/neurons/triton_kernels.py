"""Kernels of `neuron_experts` over slots sorted by expert: a program has slots of one expert.

A row of a product depends on one slot alone, so an Inf or NaN stays with its token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import activate, activation_slope, expert_tile


@triton.jit
def neuron_tile(weights, n, neurons, k, width):
    """``[BK, BN]``: elements ``k`` of the neurons ``n`` of an expert, zero outside."""
    inside = (n < neurons)[None, :] & (k < width)[:, None]
    return tl.load(weights + n[None, :] * width + k[:, None], mask=inside, other=0.0)


@triton.jit
def row_tile(rows, used, k, width):
    """``[BM, BK]``: elements ``k`` of rows, given by pointers; zero where not ``used``, whatever memory contains."""
    return tl.load(rows[:, None] + k[None, :], mask=used[:, None] & (k < width)[None, :], other=0.0)


@triton.jit
def pre_activation(
    rows,  # [BM] pointers
    used,
    up,  # of the expert
    gate_up,
    bias,
    n,  # [BN] neurons
    neurons,
    width,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(value, z) [BM, BN]``: x up and the input of the activation; without a gate they differ only by the bias."""
    value = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    z = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, width, BK):
        k = k0 + tl.arange(0, BK)
        row = row_tile(rows, used, k, width)
        value = tl.dot(row, neuron_tile(up, n, neurons, k, width), value, input_precision=PRECISION)
        if GATED:
            z = tl.dot(row, neuron_tile(gate_up, n, neurons, k, width), z, input_precision=PRECISION)
    if not GATED:
        z = value
    if HAS_BIAS:
        z += tl.load(bias + n, mask=n < neurons, other=0.0).to(tl.float32)[None, :]
    return value, z


@triton.jit
def neurons_fused_kernel(
    x,  # [T, width]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [EXPERTS + 1]
    up,  # [EXPERTS, neurons, width]
    gate_up,
    down,  # [EXPERTS, neurons, out_width]
    bias,  # [EXPERTS, neurons]
    out,  # [T TOP_K, out_width], by slot
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
    """Grid ``(tiles of BM slots, parts of the columns)``: both products of every slot, with all its neurons on chip.

    Every part of the columns computes the hidden activations.
    """
    expert, place, used = expert_tile(offsets, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert == EXPERTS:
        return
    e = expert.to(tl.int64)
    token = (tl.load(pair_of_slot + place, mask=used, other=0) // TOP_K).to(tl.int64)
    n = tl.arange(0, BN)
    own_up, own_gate, own_bias = up + e * neurons * width, gate_up + e * neurons * width, bias + e * neurons
    rows = x + token * width
    value, z = pre_activation(rows, used, own_up, own_gate, own_bias, n, neurons, width, GATED, HAS_BIAS, BK, PRECISION)
    h = activate(z, ACTIVATION)
    if GATED:
        h = h * value
    h = h.to(down.dtype.element_ty)
    own = down + e * neurons * out_width + n[:, None] * out_width
    results = out + place.to(tl.int64)[:, None] * out_width
    first = tl.program_id(1) * columns
    for c0 in tl.range(first, tl.minimum(first + columns, out_width), BK):
        c = c0 + tl.arange(0, BK)
        known = (c < out_width)[None, :]
        tile = tl.load(own + c[None, :], mask=(n < neurons)[:, None] & known, other=0.0)
        o = tl.dot(h, tile, input_precision=PRECISION)
        tl.store(results + c[None, :], o.to(out.dtype.element_ty), mask=used[:, None] & known)


@triton.jit
def neurons_hidden_kernel(
    x,  # [T, width]
    grad,  # [T, out_width]
    gates,  # [T, TOP_K]
    pair_of_slot,  # [T TOP_K]
    offsets,  # [EXPERTS + 1]
    up,  # [EXPERTS, neurons, width]
    gate_up,
    down,  # [EXPERTS, neurons, out_width]
    bias,  # [EXPERTS, neurons]
    h_rows,  # [T TOP_K, neurons], by slot: h; for the backward times the gate
    dvalue_rows,  # the gradients of x up
    dz_rows,  # and of x gate_up
    gate_parts,  # [parts, T TOP_K] float32: gradients of the slots' gates
    slots,
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
    expert, place, used = expert_tile(offsets, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert == EXPERTS:
        return
    e = expert.to(tl.int64)
    pair = tl.load(pair_of_slot + place, mask=used, other=0)
    token = (pair // TOP_K).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    own_up, own_gate, own_bias = up + e * neurons * width, gate_up + e * neurons * width, bias + e * neurons
    rows = x + token * width
    value, z = pre_activation(rows, used, own_up, own_gate, own_bias, n, neurons, width, GATED, HAS_BIAS, BK, PRECISION)
    act = activate(z, ACTIVATION)
    h = act
    if GATED:
        h = act * value
    at_out = place.to(tl.int64)[:, None] * neurons + n[None, :]
    known = used[:, None] & (n < neurons)[None, :]
    if BACKWARD:
        weight = tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)
        dh = tl.zeros((BM, BN), dtype=tl.float32)
        own_down = down + e * neurons * out_width
        for k0 in tl.range(0, out_width, BK):
            k = k0 + tl.arange(0, BK)
            tile = neuron_tile(own_down, n, neurons, k, out_width)
            dh = tl.dot(row_tile(grad + token * out_width, used, k, out_width), tile, dh, input_precision=PRECISION)
        tl.store(gate_parts + tl.program_id(1).to(tl.int64) * slots + place, tl.sum(h * dh, 1), mask=used)
        h = h * weight[:, None]
        dh = dh * weight[:, None]
        dz = dh
        if GATED:
            dz = dh * value
        if ACTIVATION != "none":
            dz = dz * activation_slope(z, ACTIVATION)
        if GATED:
            tl.store(dvalue_rows + at_out, (dh * act).to(dvalue_rows.dtype.element_ty), mask=known)
        tl.store(dz_rows + at_out, dz.to(dz_rows.dtype.element_ty), mask=known)
    tl.store(h_rows + at_out, h.to(h_rows.dtype.element_ty), mask=known)


@triton.jit
def neurons_rows_kernel(
    rows,  # [T TOP_K, neurons], by slot
    more_rows,
    offsets,  # [EXPERTS + 1]
    weights,  # [EXPERTS, neurons, columns]
    more_weights,
    out,  # [T TOP_K, columns], by slot
    columns,
    neurons,
    EXPERTS: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    SCAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BM slots, parts of BN columns)``: rows of slots times their expert's weights; GATED: the sum of
    two such products."""
    expert, place, used = expert_tile(offsets, tl.program_id(0), EXPERTS, SCAN, BM)
    if expert == EXPERTS:
        return
    slot = place.to(tl.int64)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    known = (c < columns)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for n0 in tl.range(0, neurons, BK):
        n = n0 + tl.arange(0, BK)
        at = expert.to(tl.int64) * neurons * columns + n[:, None] * columns + c[None, :]
        inside = (n < neurons)[:, None] & known
        row = row_tile(rows + slot * neurons, used, n, neurons)
        acc = tl.dot(row, tl.load(weights + at, mask=inside, other=0.0), acc, input_precision=PRECISION)
        if GATED:
            row = row_tile(more_rows + slot * neurons, used, n, neurons)
            acc = tl.dot(row, tl.load(more_weights + at, mask=inside, other=0.0), acc, input_precision=PRECISION)
    where = out + slot[:, None] * columns + c[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=used[:, None] & known)


@triton.jit
def weight_gradient(
    rows,  # [T TOP_K, neurons], by slot
    tokens,  # [T, columns]
    pair_of_slot,
    low,  # the expert's slots
    high,
    out,  # of the expert, [neurons, columns]
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
    n = tl.program_id(1) // parts * BM + tl.arange(0, BM)
    c = tl.program_id(1) % parts * BN + tl.arange(0, BN)
    if tl.program_id(1) // parts * BM < neurons:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for first in tl.range(low, high, BK):
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
    offsets,  # [EXPERTS + 1]
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
    order; the last axis is up, down, gate_up and bias."""
    e = tl.program_id(0).to(tl.int64)
    low = tl.load(offsets + e)
    high = tl.load(offsets + e + 1)
    which = tl.program_id(2)
    if which == 0:
        if NEED_UP:
            out = dup + e * neurons * width
            weight_gradient(dvalue_rows, x, pair_of_slot, low, high, out, width, neurons, TOP_K, PRECISION, BM, BN, BK)
    elif which == 1:
        if NEED_DOWN:
            out = ddown + e * neurons * out_width
            weight_gradient(
                h_rows, grad, pair_of_slot, low, high, out, out_width, neurons, TOP_K, PRECISION, BM, BN, BK
            )
    elif which == 2:
        if NEED_GATE_UP:
            out = dgate_up + e * neurons * width
            weight_gradient(dz_rows, x, pair_of_slot, low, high, out, width, neurons, TOP_K, PRECISION, BM, BN, BK)
    elif NEED_BIAS:
        n = tl.program_id(1) * BM + tl.arange(0, BM)
        if tl.program_id(1) * BM < neurons:
            total = tl.zeros((BM,), dtype=tl.float32)
            for first in tl.range(low, high, BK):
                place = first + tl.arange(0, BK)
                row = row_tile(dz_rows + place.to(tl.int64) * neurons, place < high, n, neurons)
                total += tl.sum(row.to(tl.float32), 0)
            tl.store(dbias + e * neurons + n, total.to(dbias.dtype.element_ty), mask=n < neurons)
