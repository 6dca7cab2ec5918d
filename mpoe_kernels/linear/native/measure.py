"""Times PyTorch's products against those of the compiled kernels: the constants of `planner.machine`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mpoe_kernels.linear.call import ForwardCall
from mpoe_kernels.linear.native.cost import fixed_seconds
from mpoe_kernels.linear.native.kernels import linear_forward
from mpoe_kernels.linear.native.work import work_of
from mpoe_kernels.planner import BlockDims, Contraction, Hardware, contraction
from mpoe_kernels.planner.cost import rate_and_half_size
from mpoe_kernels.planner.device import one_core
from mpoe_kernels.planner.machine import DTYPES, Constants, Pair, seconds_of

EXPERTS = 4
# m, n, k of PyTorch's.
LARGE, SHORT = (256, 768, 768), (16, 768, 768)
# Of the compiled kernels: long sums over many rows, and sums of 16, which finish a tile as soon as it is started.
LONG_SUMS = BlockDims(iL=64, jL=1, a=64, iC=8, jC=8, b=64, iR=1, jR=64, in_features=512, out_features=512)
SHORT_SUMS = BlockDims(iL=16, jL=16, a=16, iC=4, jC=4, b=16, iR=8, jR=8, in_features=512, out_features=512)
LONG_SLOTS, SHORT_SLOTS = 256, 16
# Maximum factor by which a tile's store time may differ from the table's, either way.
FACTOR = 8.0


def _library(m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], object]:
    a, b, out = (torch.ones(shape, dtype=dtype, device="cpu") for shape in ((m, k), (k, n), (m, n)))
    return partial(torch.mm, a, b, out=out)


def _compiled(plan: Contraction) -> Callable[[], object]:
    d, experts = plan.dims, plan.num_experts

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=plan.dtype, device="cpu")

    x, central = ones(plan.slots, d.in_features), ones(d.a, d.iC, d.jC, d.b)
    left, right = ones(experts, d.iL, d.jL, d.a), ones(experts, d.b, d.iR, d.jR)
    offsets = torch.tensor([plan.slots * e // experts for e in range(experts + 1)], device="cpu")
    sizes = (d.in_features, d.out_features, "none", plan.strategy, "native", False)
    return partial(linear_forward, ForwardCall(x, left, central, right, offsets, None, None, *sizes))


def tile_constants(
    plans: tuple[Contraction, Contraction], seconds: list[float], hardware: Hardware
) -> tuple[float, float]:
    """FLOP/s of tiles, and seconds in which a core stores one, with which the model reproduces both measured times.

    Args:
        plans: one dominated by multiplying, one by storing.
        seconds: measured times of both.
        hardware: numbers for everything else in the model.
    """
    works = [work_of(plan) for plan in plans]
    # The minimum left for the tiles, in case copies cost less than predicted.
    tiles = [max(s - fixed_seconds(plan, hardware), s / 4) for plan, s in zip(plans, seconds, strict=True)]
    (long, short), (t_long, t_short) = works, tiles
    each = (long.flops * t_short - short.flops * t_long) / (long.flops * short.tiles - short.flops * long.tiles)
    usual = hardware.store_seconds.of(plans[0].dtype)
    store = min(max(each * hardware.units, usual / FACTOR), usual * FACTOR)
    multiplying = max(t_long - long.tiles * store / hardware.units, t_long / 4)
    return long.flops / multiplying, store


def measure() -> Constants:
    """Time both on one thread, in about half a second."""
    hardware = one_core()
    plans = {
        dtype: (
            contraction("separable", LONG_SUMS, EXPERTS, LONG_SLOTS, dtype, "forward"),
            contraction("rebuild", SHORT_SUMS, EXPERTS, SHORT_SLOTS, dtype, "forward"),
        )
        for dtype in DTYPES
    }
    functions = [
        function
        for dtype in DTYPES
        for function in (
            *(_library(*sizes, dtype) for sizes in (LARGE, SHORT)),
            *(_compiled(plan) for plan in plans[dtype]),
        )
    ]
    times = iter(seconds_of(functions))
    rows = []
    for dtype in DTYPES:
        large, short, *compiled = (next(times) for _ in range(4))
        short = max(short - hardware.call_seconds.of(dtype), short / 4)
        rate, half = rate_and_half_size(LARGE, 2 * math.prod(LARGE) / large, SHORT, 2 * math.prod(SHORT) / short)
        tiles, store = tile_constants(plans[dtype], compiled, hardware)
        rows.append((rate, half, tiles / rate, store))
    return Constants(*(Pair(*values) for values in zip(*rows, strict=True)))
