"""Products of two blocks of the same expert, and their sum over experts (batched GEMMs).

``out[e, m, n] = sum_k p[e, m, k] * q[e, k, n]`` rebuilds left·central, central·right or a whole weight, and projects
the gradient of such a product back onto its factors. With ``SUM`` the experts are part of the sum: that is the central
core's gradient, without atomics. Experts without slots cost nothing. With SPLITS the inner size, or the experts of a
sum, are split, and another launch adds the partial results in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import place


@triton.jit
def blocks_kernel(
    p,
    q,
    out,
    offsets,  # [experts + 1]
    experts,
    P_EXPERT: tl.constexpr,
    Q_EXPERT: tl.constexpr,
    OUT_EXPERT: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    M_SIZES: tl.constexpr,
    M_P: tl.constexpr,
    M_OUT: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_P: tl.constexpr,
    K_Q: tl.constexpr,
    N_SIZES: tl.constexpr,
    N_Q: tl.constexpr,
    N_OUT: tl.constexpr,
    SUM: tl.constexpr,
    SPLITS: tl.constexpr,
    CLEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ``(tiles of [M, N], SPLITS times experts, or SPLITS with SUM)``; ``out`` is ``[SPLITS, E, ...]``.

    CLEAR: ``out`` is overwritten, and idle experts get zeros. Without it they keep their values, and a sum accumulates
    onto ``out``, which is therefore float32.
    """
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // n_tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % n_tiles) * BN + tl.arange(0, BN)
    p_rows = place(m, M_SIZES, M_P)
    q_columns = place(n, N_SIZES, N_Q)
    split = tl.program_id(1) % SPLITS
    begin = tl.program_id(1) // SPLITS
    end = begin + 1
    first = begin * 0
    last = first + K
    if SUM:
        share = tl.cdiv(experts, SPLITS)
        begin = split * share
        end = tl.minimum(begin + share, experts)
    elif SPLITS > 1:  # whole steps, so that only the last one needs a mask
        steps: tl.constexpr = (K + SPLITS * BK - 1) // (SPLITS * BK)
        first = split * (steps * BK)
        last = tl.minimum(first + steps * BK, K)
    if SPLITS > 1:
        part = split.to(tl.int64) * OUT_EXPERT
        out += part if SUM else part * experts
    at_out = place(m, M_SIZES, M_OUT)[:, None] + place(n, N_SIZES, N_OUT)[None, :]
    for position in tl.range(begin, end, num_stages=1):
        e = begin * 0 + position  # the interpreter uses Python integers
        busy = tl.load(offsets + e + 1) > tl.load(offsets + e)
        p_at = p + e.to(tl.int64) * P_EXPERT
        q_at = q + e.to(tl.int64) * Q_EXPERT
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in tl.range(first, tl.where(busy, last, first), BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            pt = tl.load(
                p_at + p_rows[:, None] + place(k, K_SIZES, K_P)[None, :],
                mask=(m < M)[:, None] & (k < K)[None, :],
                other=0.0,
            )
            qt = tl.load(
                q_at + place(k, K_SIZES, K_Q)[:, None] + q_columns[None, :],
                mask=(k < K)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            acc = tl.dot(pt, qt, acc, input_precision=PRECISION)
        written = tl.where(busy, M, 0)
        held = M
        if CLEAR:
            written = tl.where(e == begin, M, written)
            held = tl.where(e == begin, 0, M)
        out_mask = (m < written)[:, None] & (n < N)[None, :]
        o_at = out + at_out
        if SUM:
            acc += tl.load(o_at, mask=out_mask & (m < held)[:, None], other=0.0)
        else:
            o_at += e.to(tl.int64) * OUT_EXPERT
        tl.store(o_at, acc.to(out.dtype.element_ty), mask=out_mask)
