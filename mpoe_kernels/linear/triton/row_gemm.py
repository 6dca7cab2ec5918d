"""Every expert's rows times that expert's block (a grouped GEMM), epilogue included.

``out[slot, m, n] = sum_k a[row(slot), m, k] * b[expert(slot), k, n]`` where m, k and n are groups of axes. The grid is
persistent and finds its tiles from the offsets on the device, so no launch depends on a number that only the device
knows, and a CUDA graph can capture it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import activate, pick, place, segments


@triton.jit
def rows_kernel(
    a,  # activations [rows, ...]
    b,  # blocks [E, ...], or one block for all
    out,  # [slots, ...]
    bias,  # [F]
    pre,  # pre-activation, as out
    row_index,  # row of ``a`` that a slot reads
    out_index,  # row of ``out`` that a slot gives, if PLACED
    gates,  # [slots], factors of the rows of ``out``, if PLACED
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
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PLACED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """M rows of the product per slot. Limits crop padded columns of ``a`` and ``out`` (0: none)."""
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    tail: tl.constexpr = EXPERTS if GROUPED else 1
    segment = tl.arange(0, SCAN)
    start, stop = segments(offsets, slots, EXPERTS, GROUPED, SCAN)
    wanted = segment < (tail + 1 if TAIL else tail)  # TAIL: this launch clears the empty slots
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
        a_inner = place(inner, M_SIZES, M_A)
        a_rows = a + source * A_SLOT
        b_columns = b + e.to(tl.int64) * B_EXPERT + place(n, N_SIZES, N_B)
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in tl.range(0, tl.where(e == tail, 0, K), BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            a_column = a_inner[:, None] + place(k, K_SIZES, K_A)[None, :]
            a_mask = inside[:, None]
            if K % BK != 0:
                a_mask = a_mask & (k < K)[None, :]
            if A_LIMIT > 0:
                a_mask = a_mask & (a_column < A_LIMIT)
            at = tl.load(a_rows[:, None] + a_column, mask=a_mask, other=0.0)
            b_at = b_columns[None, :] + place(k, K_SIZES, K_B)[:, None]
            if K % BK == 0 and N % BN == 0:
                bt = tl.load(b_at)
            else:
                bt = tl.load(b_at, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(at, bt, acc, input_precision=PRECISION)
        column = place(inner, M_SIZES, M_OUT)[:, None] + place(n, N_SIZES, N_OUT)[None, :]
        mask = inside[:, None] & (n < N)[None, :]
        if OUT_LIMIT > 0:
            mask = mask & (column < OUT_LIMIT)
        if HAS_BIAS:
            acc += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        to = slot
        if PLACED:
            to = tl.load(out_index + slot, mask=inside, other=0).to(tl.int64)
        at_out = to[:, None] * OUT_SLOT + column
        if SAVE_PRE:
            tl.store(pre + at_out, acc.to(pre.dtype.element_ty), mask=mask)
        acc = activate(acc, ACTIVATION)
        if PLACED:  # the gate multiplies the rounded value, as in `combine`
            gate = tl.load(gates + to, mask=inside, other=0.0).to(tl.float32)
            acc = acc.to(out.dtype.element_ty).to(tl.float32) * gate[:, None]
        if HAS_BIAS or PLACED:
            acc = tl.where(e == tail, 0.0, acc)  # empty slots are zero, regardless of bias and gate
        tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=mask)
