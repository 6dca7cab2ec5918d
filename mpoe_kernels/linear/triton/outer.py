"""Gradient of an expert's block from its rows (a GEMM whose K dimension is ragged).

``out[e, m, n] = sum_{slot of e, s} a[row(slot), m, s] * g[slot, n, s]``. Every output tile belongs to one program, so
there are no atomics; with SPLITS the rows are split, and another launch adds the partial sums in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import place


@triton.jit
def outer_kernel(
    a,  # activations [rows, ...]
    g,  # gradients [slots, ...]
    out,  # [E, ...] or [SPLITS, E, ...]
    row_index,
    offsets,  # [EXPERTS + 1]
    A_SLOT: tl.constexpr,
    G_SLOT: tl.constexpr,
    OUT_EXPERT: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    S_SIZES: tl.constexpr,
    S_A: tl.constexpr,
    S_G: tl.constexpr,
    M_SIZES: tl.constexpr,
    M_A: tl.constexpr,
    M_OUT: tl.constexpr,
    N_SIZES: tl.constexpr,
    N_G: tl.constexpr,
    N_OUT: tl.constexpr,
    A_LIMIT: tl.constexpr,
    G_LIMIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPED: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ``(tiles of [M, N], experts * SPLITS)`` when GROUPED, ``(tiles, SPLITS)`` otherwise; S rows per slot."""
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    e = tl.program_id(1) // SPLITS
    if GROUPED:
        lo = tl.load(offsets + e).to(tl.int32) * S
        hi = tl.load(offsets + e + 1).to(tl.int32) * S
    else:
        lo = e * S  # 0
        hi = tl.load(offsets + EXPERTS).to(tl.int32) * S
    stop = hi
    if SPLITS > 1:  # whole steps, so that only the last one needs a mask
        share = tl.cdiv(tl.cdiv(hi - lo, SPLITS), BK) * BK
        lo += tl.program_id(1) % SPLITS * share
        stop = tl.minimum(lo + share, hi)
    m = (tl.program_id(0) // n_tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % n_tiles) * BN + tl.arange(0, BN)
    a_column = place(m, M_SIZES, M_A)
    g_column = place(n, N_SIZES, N_G)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in tl.range(lo, stop, BK, num_stages=STAGES):
        r = r0 + tl.arange(0, BK)
        inside = r < hi
        slot = (r // S).to(tl.int64)
        shared = r % S
        source = slot
        if HAS_INDEX:
            source = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
        a_at = a_column[:, None] + place(shared, S_SIZES, S_A)[None, :]
        g_at = g_column[None, :] + place(shared, S_SIZES, S_G)[:, None]
        a_mask = (m < M)[:, None] & inside[None, :]
        g_mask = inside[:, None] & (n < N)[None, :]
        if A_LIMIT > 0:
            a_mask = a_mask & (a_at < A_LIMIT)
        if G_LIMIT > 0:
            g_mask = g_mask & (g_at < G_LIMIT)
        at = tl.load(a + (source * A_SLOT)[None, :] + a_at, mask=a_mask, other=0.0)
        gt = tl.load(g + (slot * G_SLOT)[:, None] + g_at, mask=g_mask, other=0.0)
        acc = tl.dot(at, gt, acc, input_precision=PRECISION)
    part = e
    if SPLITS > 1:
        part = tl.program_id(1) % SPLITS * (tl.num_programs(1) // SPLITS) + e
    at_out = part.to(tl.int64) * OUT_EXPERT + place(m, M_SIZES, M_OUT)[:, None] + place(n, N_SIZES, N_OUT)[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
