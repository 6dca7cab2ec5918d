"""Device functions shared by several kernels: slots of experts, sums in turn, activations, experts' products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segments(offsets, slots, EXPERTS: tl.constexpr, SCAN: tl.constexpr):
    """First and last slot of every segment, ``[SCAN]`` each.

    Segments are the experts' slots and, last, the empty slots after ``offsets[EXPERTS]``. ``SCAN`` is a power of two
    above the number of experts; unused entries are empty.
    """
    segment = tl.arange(0, SCAN)
    start = tl.load(offsets + segment, mask=segment <= EXPERTS, other=0).to(tl.int32)
    stop = tl.load(offsets + segment + 1, mask=segment < EXPERTS, other=0).to(tl.int32)
    return start, tl.where(segment == EXPERTS, slots, stop)


@triton.jit
def pick(values, position):
    """``values[position]`` of a one-dimensional block of non-negative integers."""
    return tl.sum(tl.where(tl.arange(0, values.shape[0]) == position, values, 0))


@triton.jit
def part_ends(offsets, slots, size, P: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr, CLEAR: tl.constexpr):
    """Segments and where their parts of at most ``size`` rows end, counted over all segments, ``[SCAN]`` each; the
    empty slots are a segment if ``CLEAR``."""
    start, stop = segments(offsets, slots, EXPERTS, SCAN)
    wanted = tl.arange(0, SCAN) < (EXPERTS + 1 if CLEAR else EXPERTS)
    return start, stop, tl.cumsum(tl.where(wanted, ((stop - start) * P + size - 1) // size, 0), 0)


@triton.jit
def part_of_rows(
    offsets, part, slots, size, P: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr, CLEAR: tl.constexpr
):
    """``(e, lo, first, rows)``: a part's expert, the expert's first slot, the part's first row of its rows, and their
    number: none past the last part."""
    start, stop, ends = part_ends(offsets, slots, size, P, EXPERTS, SCAN, CLEAR)
    e = tl.sum((ends <= part).to(tl.int32))
    lo = pick(start, e)
    return e, lo, (part - tl.max(tl.where(ends <= part, ends, 0))) * size, (pick(stop, e) - lo) * P


@triton.jit
def expert_tile(offsets, tile, TOP_K: tl.constexpr, EXPERTS: tl.constexpr, SCAN: tl.constexpr, BM: tl.constexpr):
    """``(choice, expert, place, used)`` of a tile of slots, see `routing.triton.SortedSlots`: of at most ``BM`` tokens
    whose choice this is; their slots ``[BM]``, and which of them are the expert's.

    The grid's first axis has the same number of tiles for every choice, more than there are: past the last one the
    expert is ``EXPERTS + 1``. Expert ``EXPERTS`` is none. ``SCAN`` is a power of two that is at least ``EXPERTS``.
    """
    tiles = tl.num_programs(0) // TOP_K
    choice = tile // tiles
    tile = tile % tiles
    own = offsets + choice * (EXPERTS + 1)
    e = tl.arange(0, SCAN)
    low = tl.load(own + e, mask=e < EXPERTS, other=0)
    high = tl.load(own + e + 1, mask=e < EXPERTS, other=0)
    ends = tl.cumsum((high - low + BM - 1) // BM, 0)
    passed = ends <= tile
    expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), EXPERTS)
    first = tl.load(own + expert) + (tile - tl.max(tl.where(passed, ends, 0), 0)) * BM
    stop = tl.load(own + expert + 1)
    place = first + tl.arange(0, BM)
    return choice, tl.where(first < stop, expert, EXPERTS + 1), place, place < stop


# Programs that add to rows of tokens in turn, the first choice's first. The order in which programs begin gives them
# their tiles, so whatever a program waits for has begun before it; a sum has one order, whatever runs first.


@triton.jit
def next_tile(tickets, TOP_K: tl.constexpr):
    """The program's tile."""
    tile = tl.program_id(0)
    if TOP_K > 1:
        tile = tl.atomic_add(tickets, 1)
    return tile


@triton.jit
def wait_for_turn(choice, tokens, done, TOP_K: tl.constexpr):
    """Until the rows of earlier choices are written; ``done`` counts their tokens, those of every choice."""
    if TOP_K > 1:  # noqa: SIM102  # known to the compiler
        if choice > 0:
            while tl.atomic_add(done, 0, sem="acquire") < choice * tokens:
                pass


@triton.jit
def add_rows(out, values, mask, choice, TOP_K: tl.constexpr):
    """Add ``values`` of a choice to what ``out`` points at; the first choice's begin."""
    if TOP_K > 1:  # no branch: it would keep the loads of a loop from being pipelined
        later = mask & (choice > tl.zeros(mask.shape, dtype=tl.int32))
        values += tl.load(out, mask=later, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(out, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def end_turn(used, done, TOP_K: tl.constexpr):
    """The rows of the ``used`` tokens are written."""
    if TOP_K > 1:
        tl.debug_barrier()  # by all warps
        tl.atomic_add(done, tl.sum(used.to(tl.int32), 0), sem="release")


@triton.jit
def no_rows(out, used, choice, columns, last):
    """The share of a choice that is no expert in rows ``out [BM]``: zeros begin them."""
    mask = used[:, None] & (columns < tl.where(choice == 0, last, 0))[None, :]
    tl.store(out[:, None] + columns[None, :], tl.zeros(mask.shape, dtype=out.dtype.element_ty), mask=mask)


@triton.jit
def range_of_part(count, part, parts):
    """First and last position of one of ``parts`` roughly equal parts of ``0 .. count``."""
    share = tl.cdiv(count, parts)
    begin = tl.minimum(part * share, count)
    return begin, tl.minimum(begin + share, count)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """Activation of a float32 pre-activation."""
    if NAME == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 0.5 (1 + tanh u) is the logistic function of 2 u
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif NAME == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def through_activation(grad, z, NAME: tl.constexpr):
    """Gradient of the pre-activation ``z`` from that of the activation; of relu also by the output."""
    if NAME == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif NAME == "gelu":
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        grad *= slope + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        grad *= s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif NAME == "silu":
        s = tl.sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    return grad


@triton.jit
def slopes(dh, value, z, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """``(dvalue, dz)`` from the gradient of the hidden activation, see `pre_activation`."""
    dz = dh
    if GATED:
        dz = dh * value
    dz = through_activation(dz, z, ACTIVATION)
    dvalue = dz
    if GATED:
        dvalue = dh * activate(z, ACTIVATION)
    return dvalue, dz


@triton.jit
def row_tile(rows, used, k, size):
    """``[BM, BK]``: elements ``k`` of rows of a size, given by pointers; zero where not ``used``, whatever memory
    contains."""
    return tl.load(rows[:, None] + k[None, :], mask=used[:, None] & (k < size)[None, :], other=0.0)


@triton.jit
def matrix_tile(matrix, k, k_size, n, n_size, BY_COLUMN: tl.constexpr):
    """``[BK, BN]`` elements of a dense matrix ``[k_size, n_size]``, or of the transpose of ``[n_size, k_size]``
    (``BY_COLUMN``); zero outside."""
    at = k[:, None] * n_size + n[None, :]
    if BY_COLUMN:
        at = n[None, :] * k_size + k[:, None]
    return tl.load(matrix + at, mask=(k < k_size)[:, None] & (n < n_size)[None, :], other=0.0)


@triton.jit
def rows_times(
    rows, used, k_size, matrix, n, n_size, BY_COLUMN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """Columns ``n`` of the product of rows and a matrix, see `row_tile` and `matrix_tile`, in float32."""
    acc = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, k_size, BK):
        k = k0 + tl.arange(0, BK)
        tile = matrix_tile(matrix, k, k_size, n, n_size, BY_COLUMN)
        acc = tl.dot(row_tile(rows, used, k, k_size), tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def pre_activation(
    rows,  # [BM] pointers
    rows_gate,  # of the gated part
    used,
    size,  # of the rows
    up,  # of an expert
    gate_up,
    bias,
    n,  # [BN] hidden units
    units,
    BY_COLUMN: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(value, z) [BM, BN]``: rows up and the input of the activation; without a gate they differ only by the bias."""
    value = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    z = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, size, BK):
        k = k0 + tl.arange(0, BK)
        tile = matrix_tile(up, k, size, n, units, BY_COLUMN)
        value = tl.dot(row_tile(rows, used, k, size), tile, value, input_precision=PRECISION)
        if GATED:
            tile = matrix_tile(gate_up, k, size, n, units, BY_COLUMN)
            z = tl.dot(row_tile(rows_gate, used, k, size), tile, z, input_precision=PRECISION)
    if not GATED:
        z = value
    if HAS_BIAS:
        z += tl.load(bias + n, mask=n < units, other=0.0).to(tl.float32)[None, :]
    return value, z
