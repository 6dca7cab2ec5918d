"""Rows times weights that are rebuilt on chip, tile by tile (a grouped GEMM), epilogue included.

``out[slot, n] = sum_k x[row(slot), k] * W_e[k, n]``, where the tile of ``W_e`` for a step is
computed from the expert's blocks in the same step and never leaves the multiprocessor. With one
value of the central digits (iC, jC) it is ``(left[rows, a] @ central[a, b]) @ right[b, columns]``:
its rows pair digits of iL and jL, its columns digits of iR and jR. Regrouping the digits turns that
product into a tile of W.

The order of digits inside rows and columns is free, since rows of left and columns of right may be
loaded in any order. Here it is chosen so that the 8 columns of W that a thread must store together
are the ones that it holds after a tensor-core product (bits 0, 3 and 4 of a column number): the
regrouping then costs only the 16-byte stores to shared memory that the second product needs anyway.

How arrays are indexed (s: slot, sorted by expert; e: expert; t: token):

    offsets[e]                      first slot of an expert; offsets[EXPERTS]: of the empty ones
    row_index[s], out_index[s]      slot -> row of ``x``, and of ``out``: tokens
    gates[t]                        of a row of ``out``
    left[e, iL, jL, a], central[a, iC, jC, b], right[e, b, iR, jR]
    x[t, column]                    column: digits (iL, iC, iR), the first one slowest

The gradient of the rows is the same product with the roles of i and j exchanged: which digits are
summed is up to the strides. So below, "k" are the digits that are summed and "n" those of the
result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpoe_kernels.triton.device_functions import COUNTS, finish, part_of_rows, rows_read


@triton.jit
def row_digits(TK: tl.constexpr, TN: tl.constexpr, TNR: tl.constexpr):
    """``(k, n)`` of every row of a rebuilt tile: digits (k, low part of n, high part of n)."""
    LOW: tl.constexpr = min(TN, max(1, 32 // TNR))
    HIGH: tl.constexpr = TN // LOW
    row = tl.arange(0, TK * TN)
    n = (row % HIGH) * LOW + (row % TN) // HIGH
    return row // TN, n


@triton.jit
def column_digits(TK: tl.constexpr, TN: tl.constexpr):
    """``(k, n)`` of every column of a rebuilt tile: digits (high k, high n, low k (4), low n
    (2))."""
    K_LOW: tl.constexpr = min(4, TK)
    N_LOW: tl.constexpr = min(2, TN)
    N_HIGH: tl.constexpr = TN // N_LOW
    low: tl.constexpr = K_LOW * N_LOW
    column = tl.arange(0, TK * TN)
    k = (column // (low * N_HIGH)) * K_LOW + (column // N_LOW) % K_LOW
    n = ((column // low) % N_HIGH) * N_LOW + column % N_LOW
    return k, n


@triton.jit
def regroup(product, TKL: tl.constexpr, TNL: tl.constexpr, TKR: tl.constexpr, TNR: tl.constexpr):
    """``[rows, columns]`` in the orders above -> tile of W ``[(k of row, k of column), (n of row, n
    of column)]``."""
    LOW: tl.constexpr = min(TNL, max(1, 32 // TNR))
    K_LOW: tl.constexpr = min(4, TKR)
    N_LOW: tl.constexpr = min(2, TNR)
    digits = tl.reshape(product, (TKL, LOW, TNL // LOW, TKR // K_LOW, TNR // N_LOW, K_LOW, N_LOW))
    digits = tl.permute(digits, 0, 3, 5, 2, 1, 4, 6)
    return tl.reshape(digits, (TKL * TKR, TNL * TNR))


@triton.jit
def load_columns(
    rows,  # pointers
    inside,
    left,  # the tile's first left digit
    c,
    right,
    SIZES: tl.constexpr,
    LIMIT: tl.constexpr,
    TL: tl.constexpr,
    TR: tl.constexpr,
):
    """``[rows, columns]``: the columns that a tile's digits stand for, with zeros for
    padding; only rows are masked if nothing is padded."""
    position = tl.arange(0, TL * TR)
    l = position // TR
    r = position % TR
    column = ((left + l) * SIZES[1] + c) * SIZES[2] + right + r
    mask = inside[:, None]
    if SIZES[0] % TL != 0 or SIZES[2] % TR != 0:
        known = (l < SIZES[0] - left) & (r < SIZES[2] - right)
        mask = mask & known[None, :]
    if LIMIT > 0:
        mask = mask & (column < LIMIT)[None, :]
    return tl.load(rows[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=COUNTS)
def fused_kernel(
    x,  # [rows, K]
    left,  # [E, ...]
    central,
    right,  # [E, ...]
    out,  # [slots, N]
    bias,  # [N] or None
    pre,  # pre-activation, as out, or None
    row_index,  # row of ``x`` that a slot reads, or None: its own
    out_index,  # row of ``out`` that a slot gives, or None
    gates,  # [slots], factors of the rows of ``out``, with out_index
    offsets,  # [EXPERTS + 1]
    slots,
    X_SLOT: tl.constexpr,
    OUT_SLOT: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    K_SIZES: tl.constexpr,  # of the left, central and right digit
    N_SIZES: tl.constexpr,
    LEFT: tl.constexpr,  # strides (expert, k, n, a)
    CENTRAL: tl.constexpr,  # (k, n, a, b)
    RIGHT: tl.constexpr,  # (expert, k, n, b)
    X_LIMIT: tl.constexpr,
    OUT_LIMIT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    KL: tl.constexpr,  # extents of a tile: of the left and right digit of k and n
    NL: tl.constexpr,
    KR: tl.constexpr,
    NR: tl.constexpr,
    DA: tl.constexpr,  # bonds, filled up to what a tensor core takes
    DB: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: at least ``row tiles * column tiles`` programs. Limits crop padded columns of x and out
    (0: none)."""
    right_tiles: tl.constexpr = (N_SIZES[2] + NR - 1) // NR
    n_tiles: tl.constexpr = ((N_SIZES[0] + NL - 1) // NL) * N_SIZES[1] * right_tiles
    e, lo, first, rows = part_of_rows(
        offsets, tl.program_id(0) // n_tiles, slots, BM, 1, EXPERTS, SCAN, True
    )
    if first >= rows:
        return
    r = first + tl.arange(0, BM)
    inside = r < rows
    slot = (lo + r).to(tl.int64)
    source = rows_read(row_index, slot, inside)

    n_tile = tl.program_id(0) % n_tiles
    nr0 = (n_tile % right_tiles) * NR
    nc = (n_tile // right_tiles) % N_SIZES[1]
    nl0 = (n_tile // (right_tiles * N_SIZES[1])) * NL

    row_k, row_n = row_digits(KL, NL, NR)
    column_k, column_n = column_digits(KR, NR)
    bond_a = tl.arange(0, DA)
    bond_b = tl.arange(0, DB)
    expert = e.to(tl.int64)
    x_rows = x + source * X_SLOT
    left_at = left + expert * LEFT[0] + row_k[:, None] * LEFT[1]
    left_at += (nl0 + row_n)[:, None] * LEFT[2]
    left_at += bond_a[None, :] * LEFT[3]
    central_at = central + nc * CENTRAL[1] + bond_a[:, None] * CENTRAL[2]
    central_at += bond_b[None, :] * CENTRAL[3]
    right_at = right + expert * RIGHT[0] + bond_b[:, None] * RIGHT[3]
    right_at += column_k[None, :] * RIGHT[1] + (nr0 + column_n)[None, :] * RIGHT[2]

    # Empty slots take no steps. The count must be unknown at compile time, or the compiler would
    # unroll the loop and run out of registers.
    steps = tl.where(e == EXPERTS, 0, ((K_SIZES[0] + KL - 1) // KL) * K_SIZES[1])
    acc = tl.zeros((BM, NL * NR), dtype=tl.float32)
    for kr0 in tl.range(0, K_SIZES[2], KR, num_stages=1):
        right_mask = (column_n < N_SIZES[2] - nr0)[None, :]
        right_mask = right_mask & (column_k < K_SIZES[2] - kr0)[None, :]
        right_mask = right_mask & (bond_b < tl.where(e == EXPERTS, 0, B))[:, None]
        rt = tl.load(right_at + kr0 * RIGHT[1], mask=right_mask, other=0.0)
        for step in tl.range(0, steps, num_stages=STAGES):
            kc = step % K_SIZES[1]
            kl0 = (step // K_SIZES[1]) * KL
            left_mask = (row_k < K_SIZES[0] - kl0)[:, None]
            left_mask = left_mask & (row_n < N_SIZES[0] - nl0)[:, None]
            left_mask = left_mask & (bond_a < A)[None, :]
            central_mask = (bond_a < A)[:, None] & (bond_b < B)[None, :]
            lt = tl.load(left_at + kl0 * LEFT[1], mask=left_mask, other=0.0)
            ct = tl.load(central_at + kc * CENTRAL[0], mask=central_mask, other=0.0)
            product = tl.dot(lt, ct, input_precision=PRECISION).to(x.dtype.element_ty)
            w = tl.dot(product, rt, input_precision=PRECISION).to(x.dtype.element_ty)
            xt = load_columns(x_rows, inside, kl0, kc, kr0, K_SIZES, X_LIMIT, KL, KR)
            wt = regroup(w, KL, NL, KR, NR)
            acc = tl.dot(xt, wt, acc, input_precision=PRECISION)

    n = tl.arange(0, NL * NR)
    nl = n // NR
    nr = n % NR
    column = ((nl0 + nl) * N_SIZES[1] + nc) * N_SIZES[2] + nr0 + nr
    n_inside = (nl < N_SIZES[0] - nl0) & (nr < N_SIZES[2] - nr0)
    if OUT_LIMIT > 0:
        n_inside = n_inside & (column < OUT_LIMIT)
    mask = inside[:, None] & n_inside[None, :]
    finish(
        acc,
        slot,
        inside,
        e < EXPERTS,
        column[None, :],
        mask,
        OUT_SLOT,
        out,
        bias,
        pre,
        out_index,
        gates,
        ACTIVATION,
    )
