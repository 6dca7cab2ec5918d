"""half_right as half_left of the mirrored problem.

With every (L, C, R) read as (R, C, L), the weight has the blocks right ``[iR, jR, b]``, central
``[b, iC, jC, a]`` and left ``[a, iL, jL]``. Rows, bias and blocks are copied to that order, and
results are copied back; in the mirrored sides, padding becomes real zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn.functional import pad

from mpoe_kernels.contract.orders import BlockDims
from mpoe_kernels.linear.gradients import Backward, Forward

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

_Call = TypeVar("_Call", bound="LinearCall")
# Axes of the mirrored blocks in those of right, central and left.
_LEFT = (0, 2, 3, 1)
_CENTRAL = (3, 1, 2, 0)
_RIGHT = (0, 3, 1, 2)


Sides = tuple[int, int, int]


def _sides(dims: BlockDims) -> tuple[Sides, Sides]:
    """Left, central and right digits of x and of y."""
    return (dims.iL, dims.iC, dims.iR), (dims.jL, dims.jC, dims.jR)


def _turned(rows: Tensor, sides: Sides) -> Tensor:
    """Whole rows ``[.., R C L]`` from rows ``[.., features]`` of sides (L, C, R), or nothing from
    nothing."""
    if rows.shape[-1] == 0:
        return rows
    padding = math.prod(sides) - rows.shape[-1]
    if padding:
        rows = pad(rows, (0, padding))
    digits = rows.unflatten(-1, sides)
    return digits.transpose(-3, -1).flatten(-3)


def _restored(rows: Tensor, sides: Sides, features: int) -> Tensor:
    """The reverse, without padding."""
    return _turned(rows, sides[::-1])[..., :features].contiguous()


def _permuted(block: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A block, or nothing from nothing."""
    if block.numel():
        return block.permute(axes).contiguous()
    return block


def _mirrored(call: _Call, **others: Any) -> _Call:
    """The mirrored call; ``others``: its other tensors."""
    ins, outs = _sides(call.dims)
    return replace(
        call,
        x=_turned(call.x, ins),
        left=_permuted(call.right, _LEFT),
        central=_permuted(call.central, _CENTRAL),
        right=_permuted(call.left, _RIGHT),
        bias=None if call.bias is None else _turned(call.bias, outs),
        in_features=math.prod(ins),
        out_features=math.prod(outs),
        strategy="half_left",
        **others,
    )


def mirrored_forward(call: ForwardCall, half_left: Callable[[ForwardCall], Forward]) -> Forward:
    """``(y, h, z)``, see `ForwardCall`, by the forward of half_left."""
    y, h, z = half_left(_mirrored(call))
    _, outs = _sides(call.dims)
    y = _restored(y, outs, call.out_features)
    z = _restored(z, outs, call.out_features)
    return y, h, z


def mirrored_backward(
    call: BackwardCall, half_left: Callable[[BackwardCall], Backward]
) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`, by the backward of
    half_left."""
    ins, outs = _sides(call.dims)
    x, left, central, right, bias = call.need
    mirrored = _mirrored(call, grad=_turned(call.grad, outs), saved=_turned(call.saved, outs))
    mirrored.need = [x, right, central, left, bias]
    dx, dright, dcentral, dleft, dbias = half_left(mirrored)
    return (
        _restored(dx, ins, call.in_features),
        # The reverse of _RIGHT is _LEFT and the other way round; _CENTRAL is its own.
        _permuted(dleft, _LEFT),
        _permuted(dcentral, _CENTRAL),
        _permuted(dright, _RIGHT),
        _restored(dbias, outs, call.out_features),
    )
