"""Grouped products by Triton: every expert's rows times its own block, and the gradient of the blocks.

PyTorch has such a kernel for bfloat16 on some GPUs only, and everywhere else reads the offsets on the CPU. Here rows
are also gathered, and blocks read in any layout, as they are loaded. One program computes one tile of one expert:

    rows: grid (tiles of rows, tiles of columns), ``out[s, p, n] = sum_k a[row_index[s], p, k] b[e, k, n]``
    blocks: grid (tiles, parts of the rows, experts), ``out[e, m, n] = sum_{s, p} a[row_index[s], p, m] g[s, p, n]``

Sums run in a fixed order: partial ones are stored and added by another launch. Tiles follow from sizes and the card
only: nothing is timed, so a graph can capture every launch; each is compiled ahead of time by
``tools/gpu_compile.py``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpoe_kernels.linear.grouped import Slots
from mpoe_kernels.linear.op import ForwardCall
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.architecture import INTERPRETER
from mpoe_kernels.triton.device_functions import activate, pick, segments
from mpoe_kernels.triton.start import cdiv, power_of_two, precision, start

MOST_PARTS = 32
LEAST_STEPS = 8  # inner steps of a part, so that it can prefetch and is worth the sum that follows


class Tile(NamedTuple):
    """Block sizes of a GEMM ``[m, k] x [k, n]``, warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operands' blocks in all stages."""
        return self.stages * self.k * (self.m + self.n) * dtype.itemsize


# The widest problem's first; the same for both kernels, ``rows`` and ``blocks``.
_NVIDIA = (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(32, 64, 64, 4, 3), Tile(16, 64, 64, 4, 3))
_AMD = tuple(tile._replace(k=32, stages=2) for tile in _NVIDIA)
TILES = {"sm_80": _NVIDIA, "sm_90": _NVIDIA, "sm_100": _NVIDIA, "gfx942": _AMD}
# Without a GPU, kernels run in the interpreter, where small tiles would only add steps.
TILES[INTERPRETER] = (Tile(64, 64, 64, 4, 1),)


def _for_float32(tile: Tile) -> Tile:
    """A smaller tile: without tensor cores a thread holds its rows and columns of all k in registers."""
    warps = 8 if tile.m >= 64 else tile.warps  # wide ones spill if there are few registers per thread
    return Tile(min(tile.m, 64), min(tile.n, 64), 16, warps, tile.stages)


def shipped_tiles(name: str, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Tiles on an architecture, the widest first."""
    smaller = dtype == torch.float32 and name != INTERPRETER
    return tuple(map(_for_float32, TILES[name])) if smaller else TILES[name]


def least_shared_bytes(name: str, dtype: torch.dtype) -> int:
    """Shared memory in which the smallest tile fits."""
    return min(tile.shared_bytes(dtype) for tile in shipped_tiles(name, dtype))


def tile_of(like: Tensor, m: float, n: float, k: float) -> Tile:
    """Tile of an ``m x n x k`` GEMM on the device of ``like``: the widest that its rows fill and that fits into shared
    memory, and no larger than the problem."""
    target = architecture.target_of(like.device)
    shipped = shipped_tiles(target.architecture, like.dtype)
    able = [tile for tile in shipped if tile.shared_bytes(like.dtype) <= target.shared_memory] or shipped[-1:]
    found = next((tile for tile in able if tile.m <= m), able[-1])
    return found._replace(m=min(found.m, _side(m)), n=min(found.n, _side(n)), k=min(found.k, _side(k)))


def _side(size: float) -> int:
    """Power of two that covers a size, at least 16, the least that a tensor core takes."""
    return max(16, 1 << max(int(-(-size // 1)) - 1, 0).bit_length())


@triton.jit
def grouped_rows_kernel(
    a,  # [.., P, K]
    b,  # [EXPERTS, K, N]
    out,  # [slots, P, N]
    bias,  # [P N]
    pre,  # pre-activation, as out
    row_index,  # row of ``a`` that a slot reads
    offsets,  # [EXPERTS + 1]
    slots,
    A_SLOT: tl.constexpr,
    A_P: tl.constexpr,
    A_K: tl.constexpr,
    B_EXPERT: tl.constexpr,
    B_K: tl.constexpr,
    B_N: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SAME: tl.constexpr,  # rows of a tile that surely belong to one slot
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    CLEAR: tl.constexpr,  # clear the slots after the last expert's
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SAVE_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    start, stop = segments(offsets, slots, EXPERTS, SCAN)
    wanted = tl.arange(0, SCAN) < (EXPERTS + 1 if CLEAR else EXPERTS)
    ends = tl.cumsum(tl.where(wanted, ((stop - start) * P + BM - 1) // BM, 0), 0)
    tile = tl.program_id(0)
    if tile >= tl.max(ends):
        return
    e = tl.sum((ends <= tile).to(tl.int32))
    lo = pick(start, e)
    r = (tile - tl.max(tl.where(ends <= tile, ends, 0))) * BM + tl.arange(0, BM)
    inside = r < (pick(stop, e) - lo) * P
    slot = (lo + r // P).to(tl.int64)
    source = slot
    if HAS_INDEX:
        source = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
        source = tl.max_constancy(source, (SAME,))  # so that neighbouring rows are loaded together
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    a_rows = a + (source * A_SLOT + (r % P) * A_P)[:, None]
    b_columns = b + e.to(tl.int64) * B_EXPERT + (n * B_N)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k0 in tl.range(0, tl.where(e == EXPERTS, 0, K), BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK)
        a_mask = inside[:, None]
        b_mask = (n < N)[None, :]
        if K % BK != 0:
            a_mask = a_mask & (k < K)[None, :]
            b_mask = b_mask & (k < K)[:, None]
        at = tl.load(a_rows + (k * A_K)[None, :], mask=a_mask, other=0.0)
        bt = tl.load(b_columns + (k * B_K)[:, None], mask=b_mask, other=0.0)
        acc = tl.dot(at, bt, acc, input_precision=PRECISION)
    mask = inside[:, None] & (n < N)[None, :]
    if HAS_BIAS:  # empty slots stay zero
        column = (r % P)[:, None] * N + n[None, :]
        acc += tl.where(e == EXPERTS, 0.0, tl.load(bias + column, mask=mask, other=0.0).to(tl.float32))
    at_out = (slot * (P * N) + (r % P) * N)[:, None] + n[None, :]
    if SAVE_PRE:
        tl.store(pre + at_out, acc.to(pre.dtype.element_ty), mask=mask)
    tl.store(out + at_out, activate(acc, ACTIVATION).to(out.dtype.element_ty), mask=mask)


@triton.jit
def grouped_blocks_kernel(
    a,  # [.., P, M]
    g,  # [slots, P, N]
    out,  # [experts, M, N], or float32 [parts, experts, M, N]
    row_index,  # row of ``a`` that a slot reads
    offsets,  # [experts + 1]
    A_SLOT: tl.constexpr,
    A_P: tl.constexpr,
    A_M: tl.constexpr,
    G_SLOT: tl.constexpr,
    G_P: tl.constexpr,
    G_N: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    m = (tl.program_id(0) // n_tiles) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % n_tiles) * BN + tl.arange(0, BN)
    e = tl.program_id(2)
    lo = tl.load(offsets + e).to(tl.int32)
    rows = (tl.load(offsets + e + 1).to(tl.int32) - lo) * P
    share = tl.cdiv(tl.cdiv(rows, tl.num_programs(1)), BK) * BK  # whole steps
    first = tl.program_id(1) * share
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for r0 in tl.range(first, tl.minimum(first + share, rows), BK, num_stages=STAGES):
        r = r0 + tl.arange(0, BK)
        inside = r < rows
        slot = (lo + r // P).to(tl.int64)
        source = slot
        if HAS_INDEX:
            source = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
        a_at = (source * A_SLOT + (r % P) * A_P)[None, :] + (m * A_M)[:, None]
        g_at = (slot * G_SLOT + (r % P) * G_P)[:, None] + (n * G_N)[None, :]
        at = tl.load(a + a_at, mask=(m < M)[:, None] & inside[None, :], other=0.0)
        gt = tl.load(g + g_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(at, gt, acc, input_precision=PRECISION)
    to = (tl.program_id(1) * tl.num_programs(2) + e).to(tl.int64) * (M * N)
    at_out = to + m[:, None] * N + n[None, :]
    tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


def _options(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "PRECISION": precision(dtype),
        "BM": tile.m,
        "BN": tile.n,
        "BK": tile.k,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _loadable(rows: Tensor) -> Tensor:
    """Rows that can be loaded 8 elements at a time, as copies if need be: single ones load several times slower."""
    able = any(stride == 1 and size % 8 == 0 for stride, size in zip(rows.stride()[1:], rows.shape[1:], strict=True))
    return rows if able else rows.contiguous()


def rows(
    rows: Tensor,
    row_index: Tensor | None,
    blocks: Tensor,
    slots: Slots,
    last: ForwardCall | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """See `mpoe_kernels.linear.grouped.Grouped`. One launch."""
    a, (experts, k, n), p = _loadable(rows), blocks.shape, rows.shape[1]
    out = a.new_empty(slots.count, p, n) if out is None else out
    pre = torch.empty_like(out) if last is not None and last.saves_z else None
    bias = None if last is None else last.bias
    tile = tile_of(a, slots.count * p / experts, n, k)
    start(
        grouped_rows_kernel,
        (cdiv(slots.count * p, tile.m) + experts + 1 if slots.count else 0, cdiv(n, tile.n)),
        a=a,
        b=blocks,
        out=out,
        bias=out if bias is None else bias,
        pre=out if pre is None else pre,
        row_index=out if row_index is None else row_index,
        offsets=slots.offsets,
        slots=slots.count,
        A_SLOT=a.stride(0),
        A_P=a.stride(1),
        A_K=a.stride(2),
        B_EXPERT=blocks.stride(0),
        B_K=blocks.stride(1),
        B_N=blocks.stride(2),
        P=p,
        K=k,
        N=n,
        SAME=min(p & -p, tile.m, 16),
        EXPERTS=experts,
        SCAN=power_of_two(experts + 1),
        CLEAR=not slots.is_part,
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION="none" if last is None else last.activation,
        SAVE_PRE=pre is not None,
        **_options(tile, a.dtype),
    )
    return out, None if pre is None else pre.flatten(1)


def blocks(rows: Tensor, row_index: Tensor | None, grads: Tensor, slots: Slots) -> Tensor:
    """See `mpoe_kernels.linear.grouped.Grouped`. One launch, and a sum if there are parts."""
    a, g, (_, p, m), n = _loadable(rows), _loadable(grads), rows.shape, grads.shape[2]
    experts, inner = slots.offsets.shape[0] - 1, slots.count * p / max(slots.offsets.shape[0] - 1, 1)
    tile = tile_of(a, m, n, inner)
    tiles = cdiv(m, tile.m) * cdiv(n, tile.n)
    parts = parts_of(a.device, experts * tiles, int(inner / (LEAST_STEPS * tile.k)))
    dtype = a.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, experts, m, n, dtype=dtype, device=a.device)
    start(
        grouped_blocks_kernel,
        (tiles, parts, experts),
        a=a,
        g=g,
        out=out,
        row_index=out if row_index is None else row_index,
        offsets=slots.offsets,
        A_SLOT=a.stride(0),
        A_P=a.stride(1),
        A_M=a.stride(2),
        G_SLOT=g.stride(0),
        G_P=g.stride(1),
        G_N=g.stride(2),
        P=p,
        M=m,
        N=n,
        HAS_INDEX=row_index is not None,
        **_options(tile, a.dtype),
    )
    return out[0] if parts == 1 else out.sum(0).to(a.dtype)


def parts_of(device: torch.device, programs: int, most: int) -> int:
    """Parts of a sum, a power of two: enough programs for half of the multiprocessors."""
    units, parts = architecture.target_of(device).multiprocessors, 1
    while 2 * programs * parts <= units and 2 * parts <= min(most, MOST_PARTS):
        parts *= 2
    return parts
