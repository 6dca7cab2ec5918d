"""Kernel family 2: gradient of an expert's block from its rows (a GEMM whose K dimension is ragged).

``out[e, m, n] = sum_{slot of e, s} a[row(slot), m, s] * g[slot, n, s]``. Every output tile belongs to one program, so
there are no atomics; a block that all experts share is split over rows into partial sums that the host adds.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device import place


@triton.jit
def outer_kernel(
    a,  # activations [rows, ...]
    g,  # gradients [slots, ...]
    out,  # [E, ...] or [splits, ...]
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
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ``(tiles of [M, N], experts)`` when GROUPED, ``(tiles, splits)`` otherwise; S rows per slot."""
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    part = tl.program_id(1)
    if GROUPED:
        lo = tl.load(offsets + part).to(tl.int32)
        hi = tl.load(offsets + part + 1).to(tl.int32)
    else:
        filled = tl.load(offsets + EXPERTS).to(tl.int32)
        share = tl.cdiv(filled, tl.num_programs(1))
        lo = tl.minimum(part * share, filled)
        hi = tl.minimum(lo + share, filled)
    m = (tl.program_id(0) // n_tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % n_tiles) * BN + tl.arange(0, BN)
    a_column = place(m, M_SIZES, M_A)
    g_column = place(n, N_SIZES, N_G)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in tl.range(lo * S, hi * S, BK, num_stages=STAGES):
        r = r0 + tl.arange(0, BK)
        inside = r < hi * S
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
    at_out = part.to(tl.int64) * OUT_EXPERT + place(m, M_SIZES, M_OUT)[:, None] + place(n, N_SIZES, N_OUT)[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
