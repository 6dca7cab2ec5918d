"""Grouped products by Triton: every expert's rows times its own block, and the gradient of the
blocks.

PyTorch has such a kernel for bfloat16 on some GPUs only, and everywhere else reads the offsets on
the CPU. Here rows are also gathered, and blocks read in any layout, as they are loaded. One program
computes one tile of one expert:

    rows: grid (tiles of rows, tiles of columns), ``out[s, p, n] = sum_k a[row_index[s], p, k] b[e,
        k, n]``
    blocks: grid (tiles, experts or parts of their rows), ``out[e, m, n] = sum_{s, p}
        a[row_index[s], p, m] g[s, p, n]``
    both: as blocks, with ``da[s, p, m] = sum_n g[s, p, n] b[e, m, n]`` from the same reading of g

How arrays are indexed (s: slot, sorted by expert; e: expert; p: row of a slot; t: token):

    offsets[e]              first slot of an expert; offsets[EXPERTS]: of the empty ones
    row_index[s]            slot -> row of ``a``, mostly a token
    out_index[s]            slot -> row of ``out``, a token
    gates[t]                of a row of ``out``
    out[s, p, n], pre[s, p, n], bias[p, n]
    parts[q, m, n]          q: parts of the experts' rows, one expert after the other

Sums run in a fixed order: those of parts are stored and added by another launch. Tiles follow from
sizes and the card; of two that fit, `rows` takes the faster where something may be timed. Each is
compiled ahead of time by ``tools/gpu_compile.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpoe_kernels.linear.grouped import BlocksProduct, RowsProduct
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import INTERPRETER
from mpoe_kernels.triton.device_functions import (
    COUNTS,
    finish,
    part_ends,
    part_of_rows,
    pick,
    rows_read,
    through_activation,
)
from mpoe_kernels.triton.start import (
    Options,
    Tile,
    cdiv,
    power_of_two,
    precision,
    row_tiles,
    start,
    start_best,
)

LEAST_STEPS = 8  # inner steps of a part, so that it can prefetch and is worth the sum that follows
SUM_BLOCK = 256  # elements of a block that one program adds

# The widest problem's first; the same for both kernels, ``rows`` and ``blocks``. None spills on any
# card (tools/gpu_compile.py); none has been timed on one yet.
_NVIDIA = (
    Tile(128, 128, 64, 8, 3),
    Tile(64, 128, 64, 4, 3),
    Tile(32, 64, 64, 4, 3),
    Tile(16, 64, 64, 4, 3),
)
_AMD = tuple(tile._replace(inner=32, stages=2) for tile in _NVIDIA)
TILES = {"sm_80": _NVIDIA, "sm_90": _NVIDIA, "sm_100": _NVIDIA, "gfx942": _AMD}
# Of `both`: the whole block, and rows at once.
BOTH_TILES = {
    "sm_80": Tile(64, 64, 32, 4, 3),
    "gfx942": Tile(64, 64, 32, 4, 2),
    INTERPRETER: Tile(64, 64, 64, 4, 1),
}
BOTH_TILES |= dict.fromkeys(("sm_90", "sm_100"), Tile(64, 64, 128, 8, 3))
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
TILES[INTERPRETER] = (Tile(64, 64, 64, 4, 1),)


def _for_float32(tile: Tile) -> Tile:
    """A smaller tile: without tensor cores a thread holds its rows and columns of all k in
    registers."""
    warps = tile.warps
    if tile.rows >= 64:
        warps = 8  # they spill if there are few registers per thread
    return Tile(min(tile.rows, 64), min(tile.columns, 64), 16, warps, tile.stages)


def shipped_tiles(name: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles on an architecture, the widest first."""
    smaller = dtype == torch.float32 and name != INTERPRETER
    if smaller:
        return tuple(map(_for_float32, TILES[name]))
    return TILES[name]


def least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    """Shared memory in which the smallest tile fits."""
    return min(tile.shared_bytes(dtype) for tile in shipped_tiles(name, dtype))


def tiles_of(like: Tensor, m: float, n: float, k: float, interleaved: bool) -> list[Tile]:
    """Tiles of an ``m x n x k`` GEMM on the device of ``like``: the widest that its rows fill and
    that fits into shared memory, then the next one; no larger than the problem. ``interleaved``:
    some elements are loaded or stored one by one, with an address each, for which a large tile
    lacks registers."""
    target = architecture.target_of(like.device)
    shipped = shipped_tiles(target.architecture, like.dtype)
    able = [tile for tile in shipped if tile.shared_bytes(like.dtype) <= target.shared_memory]
    able = able or list(shipped[-1:])
    wider = [tile for tile in able if tile.rows > m]
    first = min(len(wider), len(able) - 1)
    rows = _side(m)
    columns = _side(n)
    inner = _side(k)
    if interleaved:
        columns = min(columns, 64)
        inner = min(inner, 32)
    tiles = []
    for tile in able[first : first + 2]:
        stages = tile.stages
        if k <= tile.inner and like.dtype == torch.float32:
            stages = 1  # one step has nothing to load ahead, and it would spill on sm_80
        smaller = tile._replace(
            rows=min(tile.rows, rows),
            columns=min(tile.columns, columns),
            inner=min(tile.inner, inner),
            stages=stages,
        )
        if smaller not in tiles:
            tiles.append(smaller)
    return tiles


def _side(size: float) -> int:
    """Power of two that covers a size, at least 16, the least that a tensor core takes."""
    return max(16, power_of_two(math.ceil(size)))


@triton.jit(do_not_specialize=COUNTS)
def grouped_rows_kernel(
    a,  # [.., P, K]
    b,  # [EXPERTS, K, N]
    out,  # [slots, P, N]
    bias,  # [P N] or None
    pre,  # pre-activation, as out, or None
    row_index,  # row of ``a`` that a slot reads, or None: its own
    out_index,  # row of ``out`` that a slot gives, or None
    gates,  # of the rows of ``out``, with out_index
    offsets,  # [EXPERTS + 1]
    slots,
    A: tl.constexpr,  # strides
    B: tl.constexpr,
    OUT: tl.constexpr,  # of ``out``, whose rows are dense, and of ``bias``
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SAME: tl.constexpr,  # rows of a tile that surely belong to one slot
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    CLEAR: tl.constexpr,  # clear the slots after the last expert's
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    e, lo, first, rows = part_of_rows(offsets, tl.program_id(0), slots, BM, P, EXPERTS, SCAN, CLEAR)
    if first >= rows:
        return
    r = first + tl.arange(0, BM)
    inside = r < rows
    slot = (lo + r // P).to(tl.int64)
    source = rows_read(row_index, slot, inside)
    if row_index is not None:
        source = tl.max_constancy(source, (SAME,))  # so that neighbouring rows are loaded together
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    a_rows = a + (source * A[0] + (r % P) * A[1])[:, None]
    b_columns = b + e.to(tl.int64) * B[0] + (n * B[2])[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in tl.range(0, tl.where(e == EXPERTS, 0, K), BK):
        k = k0 + tl.arange(0, BK)
        a_mask = inside[:, None]
        b_mask = (n < N)[None, :]
        if K % BK != 0:
            a_mask = a_mask & (k < K)[None, :]
            b_mask = b_mask & (k < K)[:, None]
        at = tl.load(a_rows + (k * A[2])[None, :], mask=a_mask, other=0.0)
        bt = tl.load(b_columns + (k * B[1])[:, None], mask=b_mask, other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    mask = inside[:, None] & (n < N)[None, :]
    column = (r % P)[:, None] * OUT[1] + n[None, :] * OUT[2]
    finish(
        acc,
        slot,
        inside,
        e < EXPERTS,
        column,
        mask,
        P * N,
        out,
        bias,
        pre,
        out_index,
        gates,
        ACTIVATION,
    )


@triton.jit(do_not_specialize=COUNTS)
def grouped_blocks_kernel(
    a,  # [.., P, M]
    g,  # [slots, P, N]; of the activation, if there is one, whose input is ``a b``
    b,  # [EXPERTS, M, N] or None
    out,  # [EXPERTS, M, N], or float32 [parts, M, N]
    da,  # [slots, P, M], with b
    again,  # [slots, P, N]: ``a b``, or None
    row_index,  # row of ``a`` that a slot reads, or None: its own
    offsets,  # [EXPERTS + 1]
    slots,
    size,  # rows of a part
    A: tl.constexpr,  # strides
    G: tl.constexpr,
    B: tl.constexpr,
    DA: tl.constexpr,  # of ``da`` and ``again``, whose rows are dense
    RE: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // n_tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % n_tiles) * BN + tl.arange(0, BN)
    if IN_PARTS:
        e, lo, first, rows = part_of_rows(
            offsets, tl.program_id(1), slots, size, P, EXPERTS, SCAN, b is not None
        )
        if first >= rows:
            return
        last = tl.minimum(first + size, rows)
    else:
        e = tl.program_id(1)
        lo = tl.load(offsets + e).to(tl.int32)
        rows = (tl.load(offsets + e + 1).to(tl.int32) - lo) * P
        first = 0
        last = rows
    if b is not None:
        at_b = e.to(tl.int64) * B[0] + m[:, None] * B[1] + n[None, :] * B[2]
        b_mask = (m < M)[:, None] & (n < tl.where(e < EXPERTS, N, 0))[None, :]
        bt = tl.load(b + at_b, mask=b_mask, other=0.0)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in tl.range(first, last, BK):
        r = r0 + tl.arange(0, BK)
        inside = r < rows
        slot = (lo + r // P).to(tl.int64)
        source = rows_read(row_index, slot, inside)
        owned = inside
        if b is not None:  # empty slots give zeros
            owned = r < tl.where(e < EXPERTS, rows, 0)
        a_at = (source * A[0] + (r % P) * A[1])[None, :] + (m * A[2])[:, None]
        g_at = (slot * G[0] + (r % P) * G[1])[:, None] + (n * G[2])[None, :]
        at = tl.load(a + a_at, mask=(m < M)[:, None] & owned[None, :], other=0.0)
        gt = tl.load(g + g_at, mask=owned[:, None] & (n < N)[None, :], other=0.0)
        if again is not None or ACTIVATION != "none":
            z = tl.dot(tl.trans(at), bt, input_precision=PRECISION)
        if again is not None:
            again_at = slot[:, None] * (P * N) + (r % P)[:, None] * RE[1] + (n * RE[2])[None, :]
            again_mask = inside[:, None] & (n < N)[None, :]
            tl.store(again + again_at, z.to(again.dtype.element_ty), mask=again_mask)
        if ACTIVATION != "none":
            gt = through_activation(gt.to(tl.float32), z, ACTIVATION).to(g.dtype.element_ty)
        if b is not None:
            da_at = slot[:, None] * (P * M) + (r % P)[:, None] * DA[1] + (m * DA[2])[None, :]
            da_mask = inside[:, None] & (m < M)[None, :]
            dat = tl.dot(gt, tl.trans(bt), input_precision=PRECISION)
            tl.store(da + da_at, dat.to(da.dtype.element_ty), mask=da_mask)
        acc = tl.dot(at, gt, acc, input_precision=PRECISION)
    at_out = tl.program_id(1).to(tl.int64) * (M * N) + m[:, None] * N + n[None, :]
    out_mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=out_mask)


@triton.jit(do_not_specialize=COUNTS)
def grouped_sum_kernel(
    parts,  # float32 [parts, SIZE]
    out,  # [EXPERTS, SIZE]
    offsets,  # [EXPERTS + 1]
    slots,
    size,  # rows of a part
    P: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(blocks of the elements, EXPERTS)``: an expert's parts in order; zero without any."""
    e = tl.program_id(1)
    _start, _stop, ends = part_ends(offsets, slots, size, P, EXPERTS, SCAN, False)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    first = pick(ends, e - 1)
    at_part = parts + first.to(tl.int64) * SIZE + at
    for _part in tl.range(first, pick(ends, e)):
        total += tl.load(at_part, mask=at < SIZE, other=0.0)
        at_part += SIZE
    tl.store(out + e.to(tl.int64) * SIZE + at, total.to(out.dtype.element_ty), mask=at < SIZE)


def _loadable(rows: Tensor) -> Tensor:
    """Rows that can be loaded 8 elements at a time, as copies if need be: single ones load several
    times slower, except a few that lie beside each other (see `_interleaved`), which cost less than
    a copy."""
    _, p, k = rows.shape
    _, p_stride, k_stride = rows.stride()
    if p_stride == 1 and p % 8 == 0:
        return rows
    if k_stride == 1 and k % 8 == 0:
        return rows
    if _interleaved(rows):
        return rows
    return rows.contiguous()


def _interleaved(rows: Tensor) -> bool:
    """Whether the p elements of each k, fewer than 8, are beside each other."""
    return rows.stride(1) == 1 and 1 < rows.shape[1] == rows.stride(2) < 8


def _strides(tensor: Tensor | None) -> tuple[int, ...] | None:
    if tensor is None:
        return None
    return tensor.stride()


def rows(product: RowsProduct) -> tuple[Tensor, Tensor | None]:
    """See `mpoe_kernels.linear.grouped.Grouped`. One launch."""
    rows, row_index, blocks, slots, out, last, turned = product
    a = _loadable(rows)
    experts, k, n = blocks.shape
    p = rows.shape[1]
    if out is None and turned:
        out = a.new_empty(slots.count, n, p).transpose(1, 2)
    elif out is None:
        out = a.new_empty(slots.count, p, n)
    pre = bias = out_index = gates = None
    activation = "none"
    if last is not None:
        if last.saves_z:
            pre = torch.empty_like(out)
        bias = last.bias
        out_index = last.out_index
        gates = last.gates
        activation = last.activation
    interleaved = _interleaved(a) or _interleaved(out)
    gemm_rows = slots.count * p
    tiles = tiles_of(a, gemm_rows / experts, n, k, interleaved)

    def grid(tile: Options) -> tuple[int, int]:
        return row_tiles(gemm_rows, tile["BM"], experts), cdiv(n, tile["BN"])

    start_best(
        grouped_rows_kernel,
        grid,
        [tile.options for tile in tiles],
        a=a,
        b=blocks,
        out=out,
        bias=bias,
        pre=pre,
        row_index=row_index,
        out_index=out_index,
        gates=gates,
        offsets=slots.offsets,
        slots=slots.count,
        A=a.stride(),
        B=blocks.stride(),
        OUT=out.stride(),
        P=p,
        K=k,
        N=n,
        SAME=min(p & -p, 16),
        EXPERTS=experts,
        SCAN=power_of_two(experts + 1),
        CLEAR=not slots.is_part,
        ACTIVATION=activation,
        PRECISION=precision(a.dtype),
    )
    return out, pre


def blocks(product: BlocksProduct) -> Tensor:
    """See `mpoe_kernels.linear.grouped.Grouped`. One launch, and one for the sum if there are
    parts."""
    a = _loadable(product.rows)
    g = _loadable(product.grads)
    b = product.blocks
    slots = product.slots
    _, p, m = a.shape
    n = g.shape[2]
    experts = slots.offsets.shape[0] - 1
    target = architecture.target_of(a.device)
    rows = slots.count * p
    programs = target.multiprocessors
    if b is None:  # what more parts would save, their sum would take
        programs = cdiv(programs, 2)
        # Its parts are memory, so nothing is timed.
        interleaved = _interleaved(a) or _interleaved(g)
        tile = tiles_of(a, m, n, rows / max(experts, 1), interleaved)[0]
    else:
        tile = BOTH_TILES[target.architecture]._replace(rows=_side(m), columns=_side(n))
    tiles = cdiv(m, tile.rows) * cdiv(n, tile.columns)
    steps = cdiv(rows * tiles, programs * tile.inner)
    size = max(LEAST_STEPS, steps) * tile.inner
    is_idle = tiles * experts <= programs
    in_parts = b is not None or (is_idle and rows > size * experts)
    out = sums = a.new_empty(experts, m, n)
    if in_parts:
        parts = cdiv(rows, size) + experts
        if b is not None:  # the empty slots
            parts += 1
        sums = a.new_empty(parts, m, n, dtype=torch.float32)
    where: dict[str, Any] = {
        "offsets": slots.offsets,
        "slots": slots.count,
        "size": size,
        "P": p,
        "EXPERTS": experts,
        "SCAN": power_of_two(experts + 1),
    }
    start(
        grouped_blocks_kernel,
        (tiles, sums.shape[0]),
        a=a,
        g=g,
        b=b,
        out=sums,
        da=product.drows,
        again=product.again,
        row_index=product.row_index,
        A=a.stride(),
        G=g.stride(),
        B=_strides(b),
        DA=_strides(product.drows),
        RE=_strides(product.again),
        M=m,
        N=n,
        IN_PARTS=in_parts,
        ACTIVATION=product.activation,
        PRECISION=precision(a.dtype),
        **where,
        **tile.options,
    )
    if in_parts:
        start(
            grouped_sum_kernel,
            (cdiv(m * n, SUM_BLOCK), experts),
            parts=sums,
            out=out,
            SIZE=m * n,
            BLOCK=SUM_BLOCK,
            num_warps=4,
            **where,
        )
    return out
