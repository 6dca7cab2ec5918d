"""Experts on the hidden side. A program owns some tokens and one group of hidden units.

Forward and the rows' gradients loop over the experts that the program's tokens chose, in order. If many experts share
the tokens, a program first gathers each expert's rows (``BM < BT``) and adds the results back through a 0/1 matrix;
otherwise every expert computes all rows, with gates of zero for rows that did not choose it (``BM == BT``). The blocks'
gradients run over slots sorted by expert. No atomics: every output is written by one program, and every sum has a fixed
order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.hidden_experts.triton.hidden_tiles import block_tile, choices, pre_activation
from mpoe_kernels.triton.device_functions import activate


@triton.jit
def hidden_forward_kernel(
    u,  # [T, F]
    u_gate,  # [T, F]
    gates,  # [T, TOP_K]
    index,  # [T, TOP_K]
    right,  # [EXPERTS, OWN, B, B]
    right_gate,
    left,
    bias,  # [EXPERTS, F]
    out,  # [T, F]
    tokens,
    F,
    EXPERTS: tl.constexpr,
    OWN: tl.constexpr,
    TOP_K: tl.constexpr,
    KP: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Grid ``(tiles of BT tokens, groups, parts of BN of a group's outputs)``."""
    group = tl.program_id(1)
    j = tl.program_id(2) * BN + tl.arange(0, BN)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    key, gate, _, _ = choices(index, gates, token, tokens, EXPERTS, TOP_K, KP)
    acc = tl.zeros((BT, BN), dtype=tl.float32)
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
            part = acc
            if BM < BT:
                part = tl.zeros((BM, BN), dtype=tl.float32)
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
                h = activate(z, ACTIVATION)
                if GATED:
                    h = h * value
                h = tl.where(used[:, None], h * row_weight[:, None], 0.0).to(left.dtype.element_ty)
                part = tl.dot(h, block_tile(left + at, n, j, B), part, input_precision=PRECISION)
            if BM < BT:
                moves = tl.where(hit, 1.0, 0.0).to(out.dtype.element_ty)
                moved = part.to(out.dtype.element_ty)
                acc = tl.dot(moves, moved, acc, input_precision=PRECISION)
            else:
                acc = part
        e = tl.min(tl.where(key > e, key, EXPERTS))
    at_out = token.to(tl.int64)[:, None] * F + group * B + j[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=(token < tokens)[:, None] & (j < B)[None, :])
