"""Every expert's whole weight, and the half that it is built from, in one launch.

``half[e, r, c, s] = sum_k p[e, r, k] * core[k, c, s]`` and ``out[e, r, c, n] = sum_s half[e, r, c, s] * q[e, s, n]``:
left and central before right, or central and right before left. A program owns some rows r and one cell c (the central
block's own two axes): it computes the part of the half that it needs, and finds it in its multiprocessor's cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device import place


@triton.jit
def weights_kernel(
    p,  # [E, ...], outer block of the half
    core,  # central block
    half,  # [E, ...]
    q,  # [E, ...], the other outer block
    out,  # [E, ...]
    offsets,  # [E + 1]
    P_EXPERT: tl.constexpr,
    HALF_EXPERT: tl.constexpr,
    Q_EXPERT: tl.constexpr,
    OUT_EXPERT: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    CELLS: tl.constexpr,
    M_SIZES: tl.constexpr,
    M_OUT: tl.constexpr,
    M_P: tl.constexpr,
    M_HALF: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_CORE: tl.constexpr,
    K_P: tl.constexpr,
    S_SIZES: tl.constexpr,
    S_CORE: tl.constexpr,
    S_HALF: tl.constexpr,
    S_Q: tl.constexpr,
    N_SIZES: tl.constexpr,
    N_OUT: tl.constexpr,
    N_Q: tl.constexpr,
    CELL_SIZES: tl.constexpr,
    CELL_OUT: tl.constexpr,
    CELL_CORE: tl.constexpr,
    CELL_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ``(tiles of M times CELLS, experts)``. Idle experts keep what they had."""
    e = tl.program_id(1)
    if tl.load(offsets + e + 1) > tl.load(offsets + e):
        cell = tl.program_id(0) % CELLS
        m = (tl.program_id(0) // CELLS) * BM + tl.arange(0, BM)
        m_inside = (m < M)[:, None]
        p_rows = p + e.to(tl.int64) * P_EXPERT + place(m, M_SIZES, M_P)
        core_at = core + place(cell, CELL_SIZES, CELL_CORE)
        half_rows = half + e.to(tl.int64) * HALF_EXPERT + place(cell, CELL_SIZES, CELL_HALF) + place(m, M_SIZES, M_HALF)
        for s0 in tl.range(0, S, BN, num_stages=1):
            s = s0 + tl.arange(0, BN)
            core_columns = place(s, S_SIZES, S_CORE)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for k0 in tl.range(0, K, BK, num_stages=STAGES):
                k = k0 + tl.arange(0, BK)
                pt = tl.load(
                    p_rows[:, None] + place(k, K_SIZES, K_P)[None, :], mask=m_inside & (k < K)[None, :], other=0.0
                )
                ct = tl.load(
                    core_at + place(k, K_SIZES, K_CORE)[:, None] + core_columns[None, :],
                    mask=(k < K)[:, None] & (s < S)[None, :],
                    other=0.0,
                )
                acc = tl.dot(pt, ct, acc, input_precision=PRECISION)
            tl.store(
                half_rows[:, None] + place(s, S_SIZES, S_HALF)[None, :],
                acc.to(half.dtype.element_ty),
                mask=m_inside & (s < S)[None, :],
            )
        tl.debug_barrier()  # the program's other threads read what this one wrote
        q_at = q + e.to(tl.int64) * Q_EXPERT
        out_rows = out + e.to(tl.int64) * OUT_EXPERT + place(cell, CELL_SIZES, CELL_OUT) + place(m, M_SIZES, M_OUT)
        for n0 in tl.range(0, N, BN, num_stages=1):
            n = n0 + tl.arange(0, BN)
            q_columns = place(n, N_SIZES, N_Q)
            acc = tl.zeros((BM, BN), dtype=tl.float32)
            for s0 in tl.range(0, S, BK, num_stages=STAGES):
                s = s0 + tl.arange(0, BK)
                ht = tl.load(
                    half_rows[:, None] + place(s, S_SIZES, S_HALF)[None, :],
                    mask=m_inside & (s < S)[None, :],
                    other=0.0,
                )
                qt = tl.load(
                    q_at + place(s, S_SIZES, S_Q)[:, None] + q_columns[None, :],
                    mask=(s < S)[:, None] & (n < N)[None, :],
                    other=0.0,
                )
                acc = tl.dot(ht, qt, acc, input_precision=PRECISION)
            tl.store(
                out_rows[:, None] + place(n, N_SIZES, N_OUT)[None, :],
                acc.to(out.dtype.element_ty),
                mask=m_inside & (n < N)[None, :],
            )
