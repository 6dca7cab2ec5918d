"""Gradients of the blocks from the rows, without a weight gradient in memory.

The gradient of a tile of ``W_e`` is ``x^T · grad`` over the slots of e. It is computed on chip, regrouped into ``[rows,
columns]`` (see `fused`) and projected immediately: onto ``right`` for left and central, onto ``left · central`` for
right. Every result is written by one program or is a sum of a few partial ones, which the host adds: there are no
atomics, and results are bit-identical every time. The central core's gradient sums over the experts inside the program.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import range_of_part


@triton.jit
def tile_columns(left, c, right, SIZES: tl.constexpr, TL: tl.constexpr, TR: tl.constexpr):
    """Columns of x or grad that a tile's left and right digits stand for."""
    position = tl.arange(0, TL * TR)
    return ((left + position // TR) * SIZES[1] + c) * SIZES[2] + right + position % TR


@triton.jit
def load_rows(
    rows, inside, column, left, right, SIZES: tl.constexpr, LIMIT: tl.constexpr, TL: tl.constexpr, TR: tl.constexpr
):
    """``[rows, columns]`` with zeros for padding; only rows are masked if nothing is padded."""
    mask = inside[:, None]
    position = tl.arange(0, TL * TR)
    if SIZES[0] % TL != 0 or SIZES[2] % TR != 0:
        mask = mask & ((position // TR < SIZES[0] - left) & (position % TR < SIZES[2] - right))[None, :]
    if LIMIT > 0:
        mask = mask & (column < LIMIT)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def weight_gradient(
    x,
    grad,
    row_index,
    lo,
    hi,
    kl0,
    kc,
    kr0,
    nl0,
    nc,
    nr0,
    K_SIZES: tl.constexpr,
    N_SIZES: tl.constexpr,
    X_SLOT: tl.constexpr,
    GRAD_SLOT: tl.constexpr,
    X_LIMIT: tl.constexpr,
    GRAD_LIMIT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    KL: tl.constexpr,
    NL: tl.constexpr,
    KR: tl.constexpr,
    NR: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of a tile of W over the slots ``lo .. hi``, as ``[(k, n) of left, (k, n) of right]``."""
    x_column = tile_columns(kl0, kc, kr0, K_SIZES, KL, KR)
    grad_column = tile_columns(nl0, nc, nr0, N_SIZES, NL, NR)
    acc = tl.zeros((KL * KR, NL * NR), dtype=tl.float32)
    for t0 in tl.range(lo, hi, BT, num_stages=STAGES):
        r = t0 + tl.arange(0, BT)
        inside = r < hi
        slot = r.to(tl.int64)
        source = slot
        if HAS_INDEX:
            source = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
        xt = load_rows(x + source * X_SLOT, inside, x_column, kl0, kr0, K_SIZES, X_LIMIT, KL, KR)
        gt = load_rows(grad + slot * GRAD_SLOT, inside, grad_column, nl0, nr0, N_SIZES, GRAD_LIMIT, NL, NR)
        acc = tl.dot(tl.trans(xt), gt, acc, input_precision=PRECISION)
    digits = tl.reshape(acc.to(x.dtype.element_ty), (KL, KR, NL, NR))
    return tl.reshape(tl.permute(digits, 0, 2, 1, 3), (KL * NL, KR * NR))


@triton.jit
def left_gradient_kernel(
    x,  # [rows, K]
    grad,  # [slots, N]
    left,
    central,
    right,
    out,  # float32 [parts, E, iL, jL, a], or [parts, a, iC, jC, b]
    row_index,
    offsets,
    experts,
    X_SLOT: tl.constexpr,
    GRAD_SLOT: tl.constexpr,
    OUT_PART: tl.constexpr,
    OUT: tl.constexpr,  # strides of out: (expert, k, n, a), or (k, n, a, b)
    A: tl.constexpr,
    B: tl.constexpr,
    K_SIZES: tl.constexpr,
    N_SIZES: tl.constexpr,
    LEFT: tl.constexpr,  # strides (expert, k, n, a)
    CENTRAL: tl.constexpr,  # (k, n, a, b)
    RIGHT: tl.constexpr,  # (expert, k, n, b)
    X_LIMIT: tl.constexpr,
    GRAD_LIMIT: tl.constexpr,
    OF_CENTRAL: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    KL: tl.constexpr,
    NL: tl.constexpr,
    KR: tl.constexpr,
    NR: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of left, or of central: both are projections of ``dW · right^T``.

    Grid of left: (row tiles, parts of the central digits, experts). Every program sums its part of the digits.
    Grid of central: (row tiles, parts of the experts, central digits). Every program sums its part of the experts; its
    partial result is number ``part * row tiles + row tile``.
    """
    n_tiles: tl.constexpr = (N_SIZES[0] + NL - 1) // NL
    right_n_tiles: tl.constexpr = (N_SIZES[2] + NR - 1) // NR
    right_tiles: tl.constexpr = ((K_SIZES[2] + KR - 1) // KR) * right_n_tiles
    row_tile = tl.program_id(0)
    kl0 = (row_tile // n_tiles) * KL
    nl0 = (row_tile % n_tiles) * NL
    row = tl.arange(0, KL * NL)
    row_k = kl0 + row // NL
    row_n = nl0 + row % NL
    rows_inside = (row_k < K_SIZES[0]) & (row_n < N_SIZES[0])
    column = tl.arange(0, KR * NR)
    column_k = column // NR
    column_n = column % NR
    bond_a = tl.arange(0, DA)
    bond_b = tl.arange(0, DB)
    left_rows = row_k[:, None] * LEFT[1] + row_n[:, None] * LEFT[2] + bond_a[None, :] * LEFT[3]
    left_mask = rows_inside[:, None] & (bond_a < A)[None, :]
    central_at = central + bond_a[:, None] * CENTRAL[2] + bond_b[None, :] * CENTRAL[3]
    central_mask = (bond_a < A)[:, None] & (bond_b < B)[None, :]

    fixed = tl.program_id(2)
    if OF_CENTRAL:
        begin, end = range_of_part(experts, tl.program_id(1), tl.num_programs(1))
        acc = tl.zeros((DA, DB), dtype=tl.float32)
    else:
        begin, end = range_of_part(K_SIZES[1] * N_SIZES[1], tl.program_id(1), tl.num_programs(1))
        acc = tl.zeros((KL * NL, DA), dtype=tl.float32)
    for position in tl.range(begin, end, num_stages=1):
        if OF_CENTRAL:
            e = fixed * 0 + position  # the interpreter uses Python integers
            digits = fixed
        else:
            e = fixed
            digits = fixed * 0 + position
        kc = digits // N_SIZES[1]
        nc = digits % N_SIZES[1]
        expert = e.to(tl.int64)
        lo = tl.load(offsets + e).to(tl.int32)
        hi = tl.load(offsets + e + 1).to(tl.int32)
        if hi > lo:
            half = tl.zeros((KL * NL, DB), dtype=tl.float32)
            for tile in tl.range(0, right_tiles, num_stages=1):
                kr0 = (tile // right_n_tiles) * KR
                nr0 = (tile % right_n_tiles) * NR
                dw = weight_gradient(
                    x, grad, row_index, lo, hi, kl0, kc, kr0, nl0, nc, nr0, K_SIZES, N_SIZES,
                    X_SLOT, GRAD_SLOT, X_LIMIT, GRAD_LIMIT, HAS_INDEX, PRECISION, BT, KL, NL, KR, NR, STAGES,
                )  # fmt: skip
                right_mask = (column_k < K_SIZES[2] - kr0)[:, None] & (column_n < N_SIZES[2] - nr0)[:, None]
                right_at = right + expert * RIGHT[0] + bond_b[None, :] * RIGHT[3]
                right_at += (kr0 + column_k)[:, None] * RIGHT[1] + (nr0 + column_n)[:, None] * RIGHT[2]
                rt = tl.load(right_at, mask=right_mask & (bond_b < B)[None, :], other=0.0)
                half = tl.dot(dw, rt, half, input_precision=PRECISION)
            rounded = half.to(x.dtype.element_ty)
            if OF_CENTRAL:
                lt = tl.load(left + expert * LEFT[0] + left_rows, mask=left_mask, other=0.0)
                acc = tl.dot(tl.trans(lt), rounded, acc, input_precision=PRECISION)
            else:
                ct = tl.load(central_at + kc * CENTRAL[0] + nc * CENTRAL[1], mask=central_mask, other=0.0)
                acc = tl.dot(rounded, tl.trans(ct), acc, input_precision=PRECISION)

    if OF_CENTRAL:
        part = tl.program_id(1) * tl.num_programs(0) + row_tile
        at = (fixed // N_SIZES[1]) * OUT[0] + (fixed % N_SIZES[1]) * OUT[1]
        at += bond_a[:, None] * OUT[2] + bond_b[None, :] * OUT[3]
        tl.store(out + part.to(tl.int64) * OUT_PART + at, acc, mask=central_mask)
    else:
        at = fixed.to(tl.int64) * OUT[0] + row_k[:, None] * OUT[1] + row_n[:, None] * OUT[2] + bond_a[None, :] * OUT[3]
        tl.store(out + tl.program_id(1).to(tl.int64) * OUT_PART + at, acc, mask=left_mask)


@triton.jit
def right_gradient_kernel(
    x,  # [rows, K]
    grad,  # [slots, N]
    left,
    central,
    out,  # float32 [parts, E, b, iR, jR]
    row_index,
    offsets,
    X_SLOT: tl.constexpr,
    GRAD_SLOT: tl.constexpr,
    OUT_PART: tl.constexpr,
    OUT: tl.constexpr,  # strides of out: (expert, k, n, b)
    A: tl.constexpr,
    B: tl.constexpr,
    K_SIZES: tl.constexpr,
    N_SIZES: tl.constexpr,
    LEFT: tl.constexpr,  # strides (expert, k, n, a)
    CENTRAL: tl.constexpr,  # (k, n, a, b)
    X_LIMIT: tl.constexpr,
    GRAD_LIMIT: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    KL: tl.constexpr,
    NL: tl.constexpr,
    KR: tl.constexpr,
    NR: tl.constexpr,
    DA: tl.constexpr,
    DB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (column tiles, parts of the rows, experts): ``sum of (left · central)^T · dW`` over a part of the rows."""
    n_tiles: tl.constexpr = (N_SIZES[0] + NL - 1) // NL
    row_tiles: tl.constexpr = ((K_SIZES[0] + KL - 1) // KL) * n_tiles
    right_n_tiles: tl.constexpr = (N_SIZES[2] + NR - 1) // NR
    kr0 = (tl.program_id(0) // right_n_tiles) * KR
    nr0 = (tl.program_id(0) % right_n_tiles) * NR
    e = tl.program_id(2)
    expert = e.to(tl.int64)
    lo = tl.load(offsets + e).to(tl.int32)
    hi = tl.load(offsets + e + 1).to(tl.int32)
    row = tl.arange(0, KL * NL)
    bond_a = tl.arange(0, DA)
    bond_b = tl.arange(0, DB)
    central_at = central + bond_a[:, None] * CENTRAL[2] + bond_b[None, :] * CENTRAL[3]
    central_mask = (bond_a < A)[:, None] & (bond_b < B)[None, :]
    begin, end = range_of_part(row_tiles * K_SIZES[1] * N_SIZES[1], tl.program_id(1), tl.num_programs(1))
    acc = tl.zeros((DB, KR * NR), dtype=tl.float32)
    for position in tl.range(begin, tl.where(hi > lo, end, begin), num_stages=1):
        digits = position // row_tiles
        kc = digits // N_SIZES[1]
        nc = digits % N_SIZES[1]
        kl0 = ((position % row_tiles) // n_tiles) * KL
        nl0 = (position % n_tiles) * NL
        row_k = kl0 + row // NL
        row_n = nl0 + row % NL
        rows_inside = (row_k < K_SIZES[0]) & (row_n < N_SIZES[0])
        left_at = left + expert * LEFT[0] + row_k[:, None] * LEFT[1] + row_n[:, None] * LEFT[2]
        lt = tl.load(left_at + bond_a[None, :] * LEFT[3], mask=rows_inside[:, None] & (bond_a < A)[None, :], other=0.0)
        ct = tl.load(central_at + kc * CENTRAL[0] + nc * CENTRAL[1], mask=central_mask, other=0.0)
        half = tl.dot(lt, ct, input_precision=PRECISION).to(x.dtype.element_ty)
        dw = weight_gradient(
            x, grad, row_index, lo, hi, kl0, kc, kr0, nl0, nc, nr0, K_SIZES, N_SIZES,
            X_SLOT, GRAD_SLOT, X_LIMIT, GRAD_LIMIT, HAS_INDEX, PRECISION, BT, KL, NL, KR, NR, STAGES,
        )  # fmt: skip
        acc = tl.dot(tl.trans(half), dw, acc, input_precision=PRECISION)
    column = tl.arange(0, KR * NR)
    column_k = kr0 + column // NR
    column_n = nr0 + column % NR
    inside = (bond_b < B)[:, None] & (column_k < K_SIZES[2])[None, :] & (column_n < N_SIZES[2])[None, :]
    at = expert * OUT[0] + column_k[None, :] * OUT[1] + column_n[None, :] * OUT[2] + bond_b[:, None] * OUT[3]
    tl.store(out + tl.program_id(1).to(tl.int64) * OUT_PART + at, acc, mask=inside)
