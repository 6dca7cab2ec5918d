"""Gradients of the blocks from the rows, without a weight gradient in memory.

The gradient of a tile of ``W_e`` is ``x^T @ grad`` over the slots of e. It is computed on chip,
regrouped into ``[rows, columns]`` (see `fused`) and multiplied immediately: by right, which gives
the gradient of left @ central, and by left @ central, which gives that of right. Those of left and
central are library products with the former. Every result is written by one program or is a sum of
a few partial ones, which the host adds: there are no atomics, and results are bit-identical every
time. Arrays are indexed as in `fused`; ``grad[s, column]`` by slot, the first axis of ``out`` is
the part of the central digits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.linear.triton.fused import load_columns
from mpoe_kernels.triton.device_functions import rows_read


@triton.jit
def gradient_kernel(
    x,  # [rows, K]
    grad,  # [slots, N]
    other,  # right, or left @ central
    out,
    row_index,
    offsets,
    X_SLOT: tl.constexpr,
    GRAD_SLOT: tl.constexpr,
    OUT_PART: tl.constexpr,
    OUT: tl.constexpr,  # strides of out: (expert, k, n, bond)
    OTHER: tl.constexpr,  # strides of other: (expert, k, n, k and n of central, bond)
    OF_RIGHT: tl.constexpr,
    BOND: tl.constexpr,
    K_SIZES: tl.constexpr,
    N_SIZES: tl.constexpr,
    X_LIMIT: tl.constexpr,
    GRAD_LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    KL: tl.constexpr,
    NL: tl.constexpr,
    KR: tl.constexpr,
    NR: tl.constexpr,
    DB: tl.constexpr,  # the bond, filled up to what a tensor core takes
    STAGES: tl.constexpr,
):
    """Grid (tiles of the digits of left, or OF_RIGHT, parts of the central digits, experts): ``dW @
    other`` summed over a part of the central digits and over the digits of the other side."""
    left_n_tiles: tl.constexpr = (N_SIZES[0] + NL - 1) // NL
    left_tiles: tl.constexpr = ((K_SIZES[0] + KL - 1) // KL) * left_n_tiles
    right_n_tiles: tl.constexpr = (N_SIZES[2] + NR - 1) // NR
    right_tiles: tl.constexpr = ((K_SIZES[2] + KR - 1) // KR) * right_n_tiles
    summed: tl.constexpr = left_tiles if OF_RIGHT else right_tiles
    # Extents and sizes of the digits that out has, and of those that are summed.
    OUT_K: tl.constexpr = KR if OF_RIGHT else KL
    OUT_N: tl.constexpr = NR if OF_RIGHT else NL
    SUM_K: tl.constexpr = KL if OF_RIGHT else KR
    SUM_N: tl.constexpr = NL if OF_RIGHT else NR
    side: tl.constexpr = 2 if OF_RIGHT else 0

    e = tl.program_id(2)
    expert = e.to(tl.int64)
    lo = tl.load(offsets + e).to(tl.int32)
    hi = tl.load(offsets + e + 1).to(tl.int32)
    bond = tl.arange(0, DB)
    position = tl.arange(0, SUM_K * SUM_N)
    CENTRAL: tl.constexpr = K_SIZES[1] * N_SIZES[1]
    share = tl.cdiv(CENTRAL, tl.num_programs(1))
    begin = tl.minimum(tl.program_id(1) * share, CENTRAL)
    end = tl.minimum(begin + share, CENTRAL)
    end = tl.where(hi > lo, end, begin)
    acc = tl.zeros((OUT_K * OUT_N, DB), dtype=tl.float32)
    for step in tl.range(begin * summed, end * summed, num_stages=1):
        kc = step // summed // N_SIZES[1]
        nc = step // summed % N_SIZES[1]
        left = step % summed if OF_RIGHT else tl.program_id(0)
        right = tl.program_id(0) if OF_RIGHT else step % summed
        kl0 = (left // left_n_tiles) * KL
        nl0 = (left % left_n_tiles) * NL
        kr0 = (right // right_n_tiles) * KR
        nr0 = (right % right_n_tiles) * NR
        dw = tl.zeros((KL * KR, NL * NR), dtype=tl.float32)
        for t0 in tl.range(lo, hi, BT, num_stages=STAGES):
            r = t0 + tl.arange(0, BT)
            inside = r < hi
            slot = r.to(tl.int64)
            source = rows_read(row_index, slot, inside)
            x_rows = x + source * X_SLOT
            xt = load_columns(x_rows, inside, kl0, kc, kr0, K_SIZES, X_LIMIT, KL, KR)
            grad_rows = grad + slot * GRAD_SLOT
            gt = load_columns(grad_rows, inside, nl0, nc, nr0, N_SIZES, GRAD_LIMIT, NL, NR)
            dw = tl.dot(tl.trans(xt), gt, dw, input_precision=PRECISION)
        digits = tl.reshape(dw.to(x.dtype.element_ty), (KL, KR, NL, NR))
        digits = tl.permute(digits, 0, 2, 1, 3)
        factors = tl.reshape(digits, (KL * NL, KR * NR))
        if OF_RIGHT:
            factors = tl.trans(factors)
        k = (kl0 if OF_RIGHT else kr0) + position // SUM_N
        n = (nl0 if OF_RIGHT else nr0) + position % SUM_N
        mask = (k < K_SIZES[2 - side])[:, None] & (n < N_SIZES[2 - side])[:, None]
        mask = mask & (bond < BOND)[None, :]
        at = other + expert * OTHER[0] + kc * OTHER[3] + nc * OTHER[4] + bond[None, :] * OTHER[5]
        at += k[:, None] * OTHER[1] + n[:, None] * OTHER[2]
        factor = tl.load(at, mask=mask, other=0.0)
        acc = tl.dot(factors, factor, acc, input_precision=PRECISION)

    row = tl.arange(0, OUT_K * OUT_N)
    n_tiles: tl.constexpr = right_n_tiles if OF_RIGHT else left_n_tiles
    k = (tl.program_id(0) // n_tiles) * OUT_K + row // OUT_N
    n = (tl.program_id(0) % n_tiles) * OUT_N + row % OUT_N
    mask = (k < K_SIZES[side])[:, None] & (n < N_SIZES[side])[:, None]
    mask = mask & (bond < BOND)[None, :]
    to = out + tl.program_id(1).to(tl.int64) * OUT_PART + expert * OUT[0]
    at = k[:, None] * OUT[1] + n[:, None] * OUT[2] + bond[None, :] * OUT[3]
    tl.store(to + at, acc.to(out.dtype.element_ty), mask=mask)
