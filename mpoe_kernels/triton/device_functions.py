"""Device functions shared by several kernels: slots of experts, activations, experts' products."""

from __future__ import annotations

import triton
import triton.language as tl

# Names of kernels' arguments that grow with the tokens. One compiled kernel takes them all, so that
# a captured graph of other tokens loads nothing.
COUNTS = ("tokens", "slots", "blocks", "size", "capacity")


@triton.jit
def segments(offsets, slots, EXPERTS: tl.constexpr, SCAN: tl.constexpr):
    """First and last slot of every segment, ``[SCAN]`` each.

    Segments are the experts' slots and, last, the empty slots after ``offsets[EXPERTS]``. ``SCAN``
    is a power of two above the number of experts; unused entries are empty.
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
def part_ends(
    offsets,
    slots,
    size,
    P: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """Segments and where their parts of at most ``size`` rows end, counted over all segments,
    ``[SCAN]`` each; the empty slots are a segment if ``CLEAR``."""
    start, stop = segments(offsets, slots, EXPERTS, SCAN)
    wanted = tl.arange(0, SCAN) < (EXPERTS + 1 if CLEAR else EXPERTS)
    parts = ((stop - start) * P + size - 1) // size
    return start, stop, tl.cumsum(tl.where(wanted, parts, 0), 0)


@triton.jit
def part_of_rows(
    offsets,
    part,
    slots,
    size,
    P: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCAN: tl.constexpr,
    CLEAR: tl.constexpr,
):
    """``(e, lo, first, rows)``: a part's expert, the expert's first slot, the part's first row of
    its rows, and their
    number: none past the last part."""
    start, stop, ends = part_ends(offsets, slots, size, P, EXPERTS, SCAN, CLEAR)
    passed = ends <= part
    e = tl.sum(passed.to(tl.int32))
    lo = pick(start, e)
    first = (part - tl.max(tl.where(passed, ends, 0))) * size
    rows = (pick(stop, e) - lo) * P
    return e, lo, first, rows


@triton.jit
def slots_of_program(
    order, index, tile, EXPERTS: tl.constexpr, SCAN: tl.constexpr, BM: tl.constexpr
):
    """``(expert, place, pair, used)`` of a tile of at most ``BM`` slots of one expert: their places
    and pairs ``[BM]``, and which of them are the expert's.

    Args:
        order: see `routing.triton.SortedSlots`; None: a tile is one pair, its first row.
        index: experts of pairs, without ``order``.
        tile: its number. There may be more than tiles: past the last one nothing is used, and the
            expert is ``EXPERTS + 1`` or more. Expert ``EXPERTS`` is none.
        SCAN: a power of two above the number of experts.
    """
    row = tl.arange(0, BM)
    if order is None:
        expert = tl.load(index + tile)
        expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS).to(tl.int32)
        place = (tile + row).to(tl.int64)
        pair = place
        used = row == 0
    else:
        pairs = tl.load(order + EXPERTS + 1)
        expert, low, first, rows = part_of_rows(order, tile, pairs, BM, 1, EXPERTS, SCAN, True)
        place = low + first + row
        used = place < low + rows
        pair = tl.load(order + EXPERTS + 2 + place, mask=used, other=0).to(tl.int64)
        place = place.to(tl.int64)
    return expert, place, pair, used


@triton.jit
def rows_read(row_index, slot, inside):
    """The rows that slots read: by ``row_index``, or without one their own."""
    if row_index is not None:
        slot = tl.load(row_index + slot, mask=inside, other=0).to(tl.int64)
    return slot


@triton.jit
def gates_of_pairs(gates, pair, used):
    """Gates of pairs, float32 ``[BM]``; zero where not ``used``."""
    return tl.load(gates + pair, mask=used, other=0.0).to(tl.float32)


@triton.jit
def store_rows(out, rows, values, used, columns, last):
    """Values of rows, by their numbers, in columns of ``out [.., last]``."""
    at = rows[:, None] * last + columns[None, :]
    mask = used[:, None] & (columns < last)[None, :]
    tl.store(out + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activate(z, NAME: tl.constexpr):
    """Activation of a float32 pre-activation; ``gelu_new`` has not the bits of Transformers'
    formula."""
    if NAME == "relu":
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh" or NAME == "gelu_new":
        # 0.5 (1 + tanh u) is the logistic function of 2 u
        z = z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    elif NAME == "silu":
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def through_activation(grad, z, NAME: tl.constexpr):
    """Gradient of the pre-activation ``z`` from that of the activation; of relu also by the
    output."""
    if NAME == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif NAME == "gelu":
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        grad *= slope + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif NAME == "gelu_tanh" or NAME == "gelu_new":
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        grad *= s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    elif NAME == "silu":
        s = tl.sigmoid(z)
        grad *= s * (1.0 + z * (1.0 - s))
    return grad


@triton.jit
def slopes(dh, value, z, gate_up, ACTIVATION: tl.constexpr):
    """``(dvalue, dz)`` from the gradient of the hidden activation, see `hidden_units`."""
    dz = dh
    if gate_up is not None:
        dz = dh * value
    dz = through_activation(dz, z, ACTIVATION)
    dvalue = dz
    if gate_up is not None:
        dvalue = dh * activate(z, ACTIVATION)
    return dvalue, dz


@triton.jit
def finish(
    acc,  # [BM, BN]
    slot,  # [BM]
    inside,  # which slots are
    has_expert,
    column,  # [BM or 1, BN]: element of a row
    mask,
    size,  # of a row
    out,  # [.., size]
    bias,  # [size], or None
    pre,  # as out, or None
    out_index,  # row of ``out`` that a slot gives, or None
    gates,  # of the rows of ``out``, with out_index
    ACTIVATION: tl.constexpr,
):
    """What comes after a product: bias, the pre-activation that is saved, activation, gate, and the
    store. Slots without an expert are zero, regardless of bias and gate."""
    if bias is not None:
        of_column = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
        acc += tl.where(has_expert, of_column, 0.0)
    if pre is not None:
        at = slot[:, None] * size + column
        tl.store(pre + at, acc.to(pre.dtype.element_ty), mask=mask)
    value = activate(acc, ACTIVATION).to(out.dtype.element_ty)
    if out_index is not None:  # the gate multiplies the rounded value, as in `combine`
        slot = rows_read(out_index, slot, inside)
        gate = gates_of_pairs(gates, slot, inside)[:, None]
        value = tl.where(has_expert, value.to(tl.float32) * gate, 0.0).to(out.dtype.element_ty)
    tl.store(out + slot[:, None] * size + column, value, mask=mask)


@triton.jit
def row_tile(rows, used, k, size):
    """``[BM, BK]``: elements ``k`` of rows of a size, given by pointers; zero where not ``used``,
    whatever memory contains."""
    mask = used[:, None] & (k < size)[None, :]
    return tl.load(rows[:, None] + k[None, :], mask=mask, other=0.0)


@triton.jit
def matrix_tile(matrix, k, k_size, n, n_size, BY_COLUMN: tl.constexpr):
    """``[BK, BN]`` elements of a dense matrix ``[k_size, n_size]``, or of the transpose of
    ``[n_size, k_size]`` (``BY_COLUMN``); zero outside."""
    at = k[:, None] * n_size + n[None, :]
    if BY_COLUMN:
        at = n[None, :] * k_size + k[:, None]
    mask = (k < k_size)[:, None] & (n < n_size)[None, :]
    return tl.load(matrix + at, mask=mask, other=0.0)


@triton.jit
def rows_times(
    rows,
    used,
    k_size,
    matrix,
    n,
    n_size,
    BY_COLUMN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Columns ``n`` of the product of rows and a matrix, see `row_tile` and `matrix_tile`, in
    float32."""
    acc = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, k_size, BK):
        k = k0 + tl.arange(0, BK)
        tile = matrix_tile(matrix, k, k_size, n, n_size, BY_COLUMN)
        row = row_tile(rows, used, k, k_size)
        acc = tl.dot(row, tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def hidden_units(
    rows,  # [BM] pointers
    rows_gate,  # of the gated part
    used,
    size,  # of the rows
    up,  # of all experts
    gate_up,  # or None
    at,  # where the expert's begin
    bias,  # or None
    at_bias,
    n,  # [BN] hidden units
    units,
    ACTIVATION: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``(h, value, z) [BM, BN]``: the hidden activation, rows up, and the input of the activation;
    without a gate the latter two differ only by the bias."""
    value = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    z = tl.zeros((rows.shape[0], n.shape[0]), dtype=tl.float32)
    for k0 in tl.range(0, size, BK):
        k = k0 + tl.arange(0, BK)
        tile = matrix_tile(up + at, k, size, n, units, BY_COLUMN)
        row = row_tile(rows, used, k, size)
        value = tl.dot(row, tile, value, input_precision=PRECISION)
        if gate_up is not None:
            tile = matrix_tile(gate_up + at, k, size, n, units, BY_COLUMN)
            row = row_tile(rows_gate, used, k, size)
            z = tl.dot(row, tile, z, input_precision=PRECISION)
    if gate_up is None:
        z = value
    if bias is not None:
        of_units = tl.load(bias + at_bias + n, mask=n < units, other=0.0).to(tl.float32)
        z += of_units[None, :]
    h = activate(z, ACTIVATION)
    if gate_up is not None:
        h = h * value
    return h, value, z
