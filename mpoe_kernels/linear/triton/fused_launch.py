"""Launches of the fused kernels: rows times rebuilt weights, and the blocks' gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton.configs import fused_choice
from mpoe_kernels.linear.triton.fused import fused_kernel
from mpoe_kernels.linear.triton.fused_gradient import left_gradient_kernel, right_gradient_kernel
from mpoe_kernels.linear.triton.fused_tiles import Cut, FusedTile, Sides, filled_up
from mpoe_kernels.triton import architecture
from mpoe_kernels.triton.pointwise import sum_parts
from mpoe_kernels.triton.start import cdiv, power_of_two, precision, start

MOST_PARTS = 16  # partial results of a gradient


class Blocks(NamedTuple):
    """The blocks of a weight: left ``[E, iL, jL, a]``, central ``[a, iC, jC, b]``, right ``[E, b, iR, jR]``."""

    left: Tensor
    central: Tensor
    right: Tensor


def _strides(blocks: Blocks, transposed: bool = False) -> dict[str, tuple[int, ...]]:
    """Strides of the blocks along (expert, k, n, last axis) for ``x W``, or for ``dy W^T`` if ``transposed``."""
    i, j = (2, 1) if transposed else (1, 2)
    left, central, right = (block.stride() for block in blocks)
    return {
        "LEFT": (left[0], left[i], left[j], left[3]),
        "CENTRAL": (central[i], central[j], central[0], central[3]),
        "RIGHT": (right[0], right[1 + i], right[1 + j], right[1]),
    }


def _options(tile: FusedTile, extents: Cut, sides: Sides, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "A": sides.a,
        "B": sides.b,
        "K_SIZES": sides.k,
        "N_SIZES": sides.n,
        "PRECISION": precision(dtype),
        "KL": extents.kl,
        "NL": extents.nl,
        "KR": extents.kr,
        "NR": extents.nr,
        "DA": filled_up(sides.a),
        "DB": filled_up(sides.b),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _limit(digits: tuple[int, int, int], true_columns: int) -> int:
    """True columns where the digits pad them, else 0."""
    return true_columns if true_columns != math.prod(digits) else 0


def rows_times_weight(
    call: ForwardCall | BackwardCall,
    rows: Tensor,
    out: Tensor,
    pre: Tensor | None = None,
) -> None:
    """Forward: ``out[s] = activation(rows[row_index[s]] W_e + bias)``; backward: ``out = rows W_e^T``. One launch.

    Args:
        call: the call that provides the weights.
        rows, out: ``[.., columns]`` of contiguous columns; empty slots of ``out`` become zero.
        pre: receives the pre-activation.
    """
    slots, experts, dims, blocks = out.shape[0], call.num_experts, call.dims, Blocks(*call.blocks)
    if slots == 0:
        return
    transposed = isinstance(call, BackwardCall)
    row_index, bias, activation, out_index, gates = (
        (None, None, "none", None, None)
        if isinstance(call, BackwardCall)
        else (call.row_index, call.bias, call.activation, call.out_index, call.gates)
    )
    sides = Sides.of(dims, transposed)
    tile, extents = fused_choice(rows, sides, slots / experts, "rows")
    row_tiles = cdiv(slots, tile.m) + experts + 1
    _, n_tiles = extents.tiles(sides)
    columns = (dims.in_features, dims.out_features)
    x_columns, out_columns = columns[::-1] if transposed else columns
    start(
        fused_kernel,
        (row_tiles * n_tiles,),
        x=rows,
        left=blocks.left,
        central=blocks.central,
        right=blocks.right,
        out=out,
        bias=out if bias is None else bias,
        pre=out if pre is None else pre,
        row_index=out if row_index is None else row_index,
        out_index=out if out_index is None else out_index,
        gates=out if gates is None else gates,
        offsets=call.expert_offsets,
        slots=slots,
        X_SLOT=rows.stride(0),
        OUT_SLOT=out.stride(0),
        X_LIMIT=_limit(sides.k, x_columns),
        OUT_LIMIT=_limit(sides.n, out_columns),
        EXPERTS=experts,
        SCAN=power_of_two(experts + 1),
        HAS_INDEX=row_index is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        SAVE_PRE=pre is not None,
        PLACED=out_index is not None,
        BM=tile.m,
        **_strides(blocks, transposed),
        **_options(tile, extents, sides, rows.dtype),
    )


def parts_for(device: torch.device, programs: int, most: int) -> int:
    """Parts of a sum: enough programs for all multiprocessors."""
    units = architecture.target_of(device).multiprocessors
    return max(1, min(MOST_PARTS, most, cdiv(2 * units, programs)))


def block_gradients(call: BackwardCall, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of left, central and right, if needed, from rows and the gradient ``[N, F]`` of their products.

    One launch each; none for a masked central core.
    """
    x, dims, blocks, row_index, experts = call.x, call.dims, Blocks(*call.blocks), call.row_index, call.num_experts
    _, need_left, need_central, need_right = call.need_of_plan
    sides = Sides.of(dims)
    tile, extents = fused_choice(x, sides, grad.shape[0] / experts, "gradient")
    k_tiles, n_tiles = extents.tiles(sides)
    pairs = sides.k[1] * sides.n[1]
    rows_of_tiles = cdiv(sides.k[0], extents.kl) * cdiv(sides.n[0], extents.nl)
    columns_of_tiles = k_tiles * n_tiles // (pairs * rows_of_tiles)
    strides = _strides(blocks)
    common: dict[str, Any] = {
        "x": x,
        "grad": grad,
        "left": blocks.left,
        "central": blocks.central,
        "row_index": grad if row_index is None else row_index,
        "offsets": call.expert_offsets,
        "X_SLOT": x.stride(0),
        "GRAD_SLOT": grad.stride(0),
        "LEFT": strides["LEFT"],
        "CENTRAL": strides["CENTRAL"],
        "X_LIMIT": _limit(sides.k, dims.in_features),
        "GRAD_LIMIT": _limit(sides.n, dims.out_features),
        "HAS_INDEX": row_index is not None,
        "BT": tile.m,
        **_options(tile, extents, sides, x.dtype),
    }

    def partial(shape: torch.Size, parts: int) -> Tensor:
        return torch.empty(parts, *shape, dtype=torch.float32, device=x.device)

    dleft = dcentral = dright = None
    if need_left:
        parts = parts_for(x.device, rows_of_tiles * experts, pairs)
        out = partial(blocks.left.shape, parts)
        start(
            left_gradient_kernel,
            (rows_of_tiles, parts, experts),
            right=blocks.right,
            out=out,
            experts=experts,
            OUT_PART=out.stride(0),
            OUT=out.stride()[1:],
            RIGHT=strides["RIGHT"],
            OF_CENTRAL=False,
            **common,
        )
        dleft = sum_parts(out, torch.empty_like(blocks.left, memory_format=torch.contiguous_format))
    if need_central:
        parts = parts_for(x.device, rows_of_tiles * pairs, experts)
        out = partial(blocks.central.shape, parts * rows_of_tiles)
        _, a, k, n, b = out.stride()
        start(
            left_gradient_kernel,
            (rows_of_tiles, parts, pairs),
            right=blocks.right,
            out=out,
            experts=experts,
            OUT_PART=out.stride(0),
            OUT=(k, n, a, b),
            RIGHT=strides["RIGHT"],
            OF_CENTRAL=True,
            **common,
        )
        dcentral = sum_parts(out, torch.empty_like(blocks.central, memory_format=torch.contiguous_format))
    if need_right:
        parts = parts_for(x.device, columns_of_tiles * experts, pairs * rows_of_tiles)
        out = partial(blocks.right.shape, parts)
        _, expert, b, k, n = out.stride()
        start(
            right_gradient_kernel,
            (columns_of_tiles, parts, experts),
            out=out,
            OUT_PART=out.stride(0),
            OUT=(expert, k, n, b),
            **common,
        )
        dright = sum_parts(out, torch.empty_like(blocks.right, memory_format=torch.contiguous_format))
    return dleft, dcentral, dright
