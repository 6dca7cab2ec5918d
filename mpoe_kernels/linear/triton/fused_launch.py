"""The fused contraction: weights and their gradients that never leave the chip.

Forward: one launch of `fused_kernel`. Backward: one of it for x, one of `gradient_kernel` with a
library product each for left and central, one of it for right; none for what is masked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.linear.gradients import (
    Backward,
    Forward,
    Slots,
    fused_backward,
    fused_forward,
    prepared,
)
from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall
from mpoe_kernels.linear.triton.fused import fused_kernel
from mpoe_kernels.linear.triton.fused_gradient import gradient_kernel
from mpoe_kernels.linear.triton.fused_tiles import Cut, FusedTile, Sides, filled_up, fused_choice
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.start import (
    Options,
    cdiv,
    power_of_two,
    precision,
    row_tiles,
    start,
    start_best,
)

MOST_PARTS = 32


def forward(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    return fused_forward(prepared(call), rows_times_weight)


def backward(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    return fused_backward(prepared(call), rows_times_weight, weight_gradient_times)


def _strides(call: LinearCall, transposed: bool = False) -> dict[str, tuple[int, ...]]:
    """Strides of the blocks along (expert, k, n, last axis) for ``x W``, or for ``dy W^T`` if
    ``transposed``."""
    i = 1
    j = 2
    if transposed:
        i = 2
        j = 1
    left, central, right = (block.stride() for block in call.blocks)
    return {
        "LEFT": (left[0], left[i], left[j], left[3]),
        "CENTRAL": (central[i], central[j], central[0], central[3]),
        "RIGHT": (right[0], right[1 + i], right[1 + j], right[1]),
    }


def _common(sides: Sides, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "K_SIZES": sides.k,
        "N_SIZES": sides.n,
        "PRECISION": precision(dtype),
        "DB": filled_up(sides.b),
    }


def _options(tile: FusedTile, extents: Cut) -> Options:
    return {
        "KL": extents.kl,
        "NL": extents.nl,
        "KR": extents.kr,
        "NR": extents.nr,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _limit(digits: tuple[int, int, int], true_columns: int) -> int:
    """True columns where the digits pad them, else 0."""
    if true_columns != math.prod(digits):
        return true_columns
    return 0


def rows_times_weight(
    call: ForwardCall | BackwardCall,
    rows: Tensor,
    out: Tensor,
    pre: Tensor | None,
    transposed: bool,
) -> None:
    """See `mpoe_kernels.linear.gradients.Product`: ``out[s] = activation(rows[row_index[s]] W_e +
    bias)``, or ``rows W_e^T``. One launch. Columns are contiguous; empty slots of ``out`` become
    zero."""
    slots = out.shape[0]
    experts = call.num_experts
    row_index, bias, activation, out_index, gates = call.around
    sides = Sides.of(call.dims, transposed)

    def grid(way: Options) -> tuple[int]:
        extents = Cut(way["KL"], way["NL"], way["KR"], way["NR"])
        _, column_tiles = extents.tiles(sides)
        return (row_tiles(slots, way["BM"], experts) * column_tiles,)

    ways = []
    for tile, extents in fused_choice(rows, sides, slots / experts):
        ways.append({"BM": tile.m, **_options(tile, extents)})
    start_best(
        fused_kernel,
        grid,
        ways,
        x=rows,
        left=call.left,
        central=call.central,
        right=call.right,
        out=out,
        bias=bias,
        pre=pre,
        row_index=row_index,
        out_index=out_index,
        gates=gates,
        offsets=call.expert_offsets,
        slots=slots,
        X_SLOT=rows.stride(0),
        OUT_SLOT=out.stride(0),
        X_LIMIT=_limit(sides.k, rows.shape[1]),
        OUT_LIMIT=_limit(sides.n, out.shape[1]),
        EXPERTS=experts,
        SCAN=power_of_two(experts + 1),
        ACTIVATION=activation,
        A=sides.a,
        B=sides.b,
        DA=filled_up(sides.a),
        **_strides(call, transposed),
        **_common(sides, rows.dtype),
    )


def weight_gradient_times(
    call: BackwardCall, grad: Tensor, other: Tensor, of_right: bool, slots: Slots
) -> Tensor:
    """See `mpoe_kernels.linear.gradients.block_gradients`. One launch."""
    x = call.x
    d = call.dims
    sides = Sides.of(d)
    experts = other.shape[0]
    ((tile, extents),) = fused_choice(x, sides, grad.shape[0] / call.num_experts, "gradient")
    if of_right:
        tiles = cdiv(d.iR, extents.kr) * cdiv(d.jR, extents.nr)
        parts = parts_of(grad.device, tiles * experts, d.iC * d.jC)
        out = grad.new_empty(parts, experts, d.b, d.iR, d.jR, dtype=torch.float32)
        part, expert, bond, k, n = out.stride()
        strides = other.stride()  # of left · central
    else:
        tiles = cdiv(d.iL, extents.kl) * cdiv(d.jL, extents.nl)
        parts = d.iC * d.jC
        out = grad.new_empty(experts, d.iL, d.jL, d.iC, d.jC, d.b)
        expert, k, n, _, part, bond = out.stride()
        right = other.stride()
        strides = (right[0], right[2], right[3], 0, 0, right[1])
    start(
        gradient_kernel,
        (tiles, parts, experts),
        x=x,
        grad=grad,
        other=other,
        out=out,
        row_index=call.row_index,
        offsets=slots.offsets,
        X_SLOT=x.stride(0),
        GRAD_SLOT=grad.stride(0),
        OUT_PART=part,
        OUT=(expert, k, n, bond),
        OTHER=strides,
        OF_RIGHT=of_right,
        BOND=d.b,
        X_LIMIT=_limit(sides.k, call.in_features),
        GRAD_LIMIT=_limit(sides.n, call.out_features),
        BT=tile.m,
        **_common(sides, x.dtype),
        **_options(tile, extents),
    )
    if of_right:
        return out.sum(0)
    return out


def parts_of(device: torch.device, programs: int, most: int) -> int:
    """Parts of a sum, a power of two: enough programs for half of the multiprocessors."""
    units = architecture.target_of(device).multiprocessors
    most = min(most, MOST_PARTS)
    parts = 1
    while 2 * programs * parts <= units and 2 * parts <= most:
        parts *= 2
    return parts
