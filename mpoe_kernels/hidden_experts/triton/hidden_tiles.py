"""Device functions shared by the kernels of `hidden_experts`: choices of tokens, tiles of rows and blocks, h and its
gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import activate, activation_slope


@triton.jit
def choices(index, gates, token, tokens, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, KP: tl.constexpr):
    """Experts ``[BT, KP]`` (``EXPERTS``: none) and gates of tokens, and their positions."""
    choice = tl.arange(0, KP)
    at = token[:, None] * TOP_K + choice[None, :]
    inside = (token < tokens)[:, None] & (choice < TOP_K)[None, :]
    key = tl.load(index + at, mask=inside, other=-1)
    busy = (key >= 0) & (key < EXPERTS)
    gate = tl.load(gates + at, mask=busy, other=0.0).to(tl.float32)
    return tl.where(busy, key, EXPERTS).to(tl.int32), gate, at, inside


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
