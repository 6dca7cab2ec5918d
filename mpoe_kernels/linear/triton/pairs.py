"""Two products of every expert's rows with two of its blocks, for gated networks.

``first[slot, m, n]`` and ``second[slot, m, n]`` are sums over k as in `mpoe_kernels.linear.triton.rows`; if both read
the same rows, these are gathered and read once. FINAL: the result is ``activation(first) * (second + bias)``, and only
the factors that a backward reads are written. A tile's columns are those of one product.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device import activate, pick, place, segments


@triton.jit
def pairs_kernel(
    a,  # activations [rows, ...] of the first product
    a_second,  # of the second one, laid out alike; SHARED: the same
    b,  # blocks [E, ...], or one block for all
    b_second,  # likewise, laid out alike
    out,  # [slots, ...]; FINAL: of both
    out_second,  # likewise; FINAL: the second factor
    bias,  # [F] of the second factor
    pre,  # what the activation is applied to, as out
    row_index,  # row of ``a`` that a slot reads
    offsets,  # [EXPERTS + 1]
    slots,
    A_SLOT: tl.constexpr,
    B_EXPERT: tl.constexpr,
    OUT_SLOT: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    M_SIZES: tl.constexpr,
    M_A: tl.constexpr,
    M_OUT: tl.constexpr,
    K_SIZES: tl.constexpr,
    K_A: tl.constexpr,
    K_B: tl.constexpr,
    N_SIZES: tl.constexpr,
    N_B: tl.constexpr,
    N_OUT: tl.constexpr,
    A_LIMIT: tl.constexpr,
    OUT_LIMIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUPED: tl.constexpr,
    SCAN: tl.constexpr,
    TAIL: tl.constexpr,
    SHARED: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FINAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """M rows of the product per slot; a persistent grid, as in the kernel of one product."""
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    tail: tl.constexpr = EXPERTS if GROUPED else 1
    segment = tl.arange(0, SCAN)
    start, stop = segments(offsets, slots, EXPERTS, GROUPED, SCAN)
    wanted = segment < (tail + 1 if TAIL else tail)
    ends = tl.cumsum(tl.where(wanted, ((stop - start) * M + BM - 1) // BM, 0), 0)
    for tile in tl.range(tl.program_id(0), tl.max(ends) * n_tiles, tl.num_programs(0)):
        row_tile = tile // n_tiles
        e = tl.sum((ends <= row_tile).to(tl.int32))
        r = (row_tile - tl.max(tl.where(ends <= row_tile, ends, 0))) * BM + tl.arange(0, BM)
        lo = pick(start, e)
        inside = r < (pick(stop, e) - lo) * M
        slot = (lo + r // M).to(tl.int64)
        inner = r % M
        n = (tile % n_tiles) * BN + tl.arange(0, BN)
        source = slot
        if HAS_INDEX:
            source = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
        a_rows = source * A_SLOT
        a_inner = place(inner, M_SIZES, M_A)
        b_columns = e.to(tl.int64) * B_EXPERT + place(n, N_SIZES, N_B)
        first = tl.zeros((BM, BN), dtype=tl.float32)
        second = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in tl.range(0, tl.where(e == tail, 0, K), BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            a_column = a_inner[:, None] + place(k, K_SIZES, K_A)[None, :]
            a_mask = inside[:, None] & (k < K)[None, :]
            if A_LIMIT > 0:
                a_mask = a_mask & (a_column < A_LIMIT)
            a_at = a_rows[:, None] + a_column
            b_at = b_columns[None, :] + place(k, K_SIZES, K_B)[:, None]
            b_mask = (k < K)[:, None] & (n < N)[None, :]
            rows = tl.load(a + a_at, mask=a_mask, other=0.0)
            first = tl.dot(rows, tl.load(b + b_at, mask=b_mask, other=0.0), first, input_precision=PRECISION)
            if not SHARED:
                rows = tl.load(a_second + a_at, mask=a_mask, other=0.0)
            second = tl.dot(rows, tl.load(b_second + b_at, mask=b_mask, other=0.0), second, input_precision=PRECISION)
        column = place(inner, M_SIZES, M_OUT)[:, None] + place(n, N_SIZES, N_OUT)[None, :]
        mask = inside[:, None] & (n < N)[None, :]
        if OUT_LIMIT > 0:
            mask = mask & (column < OUT_LIMIT)
        at_out = slot[:, None] * OUT_SLOT + column
        if HAS_BIAS:
            second += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
            second = tl.where(e == tail, 0.0, second)  # empty slots are zero, bias or not
        if FINAL:
            if SAVE:
                tl.store(pre + at_out, first.to(pre.dtype.element_ty), mask=mask)
            first = activate(first, ACTIVATION) * second
        if SAVE or not FINAL:
            tl.store(out_second + at_out, second.to(out_second.dtype.element_ty), mask=mask)
        tl.store(out + at_out, first.to(out.dtype.element_ty), mask=mask)
