"""Device functions shared by several kernels: slots of experts, activations."""

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
def expert_tile(offsets, tile, EXPERTS: tl.constexpr, SCAN: tl.constexpr, BM: tl.constexpr):
    """The expert of a tile of at most ``BM`` of its slots, these slots ``[BM]``, and which of them are the expert's.

    Tiles are counted expert after expert; past the last one the expert is ``EXPERTS``. ``SCAN`` is a power of two that
    is at least the number of experts.
    """
    e = tl.arange(0, SCAN)
    low = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    high = tl.load(offsets + e + 1, mask=e < EXPERTS, other=0)
    ends = tl.cumsum((high - low + BM - 1) // BM, 0)
    passed = ends <= tile
    expert = tl.minimum(tl.sum(passed.to(tl.int32), 0), EXPERTS)
    own = tile - tl.max(tl.where(passed, ends, 0), 0)  # number of the tile among its expert's
    known = tl.minimum(expert, EXPERTS - 1)
    place = tl.load(offsets + known) + own * BM + tl.arange(0, BM)
    return expert, place, place < tl.load(offsets + known + 1)


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
def activation_slope(saved, NAME: tl.constexpr):
    """Derivative of the activation; ``saved`` is the output for relu and the pre-activation for the others."""
    if NAME == "relu":
        slope = tl.where(saved > 0, 1.0, 0.0)
    elif NAME == "gelu":
        slope = 0.5 * (1.0 + tl.erf(saved * 0.7071067811865476))
        slope += saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
    elif NAME == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (saved + 0.044715 * saved * saved * saved))
        slope = s + saved * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * saved * saved)
    else:
        s = tl.sigmoid(saved)
        slope = s * (1.0 + saved * (1.0 - s))
    return slope
