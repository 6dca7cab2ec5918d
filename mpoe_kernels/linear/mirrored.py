"""half_right as half_left of the mirrored problem.

With every (L, C, R) read as (R, C, L), the weight has the blocks right ``[iR, jR, b]``, central
``[b, iC, jC, a]`` and left ``[a, iL, jL]``. Rows, bias and blocks are copied to that order, and
results are copied back; in the mirrored sides, padding becomes real zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

_Call = TypeVar("_Call", bound="LinearCall")
# Axes of the mirrored blocks in those of right, central and left.
_LEFT = (0, 2, 3, 1)
_CENTRAL = (3, 1, 2, 0)
_RIGHT = (0, 3, 1, 2)


def _in_sides(call: LinearCall) -> tuple[int, int, int]:
    return call.dims.iL, call.dims.iC, call.dims.iR


def _out_sides(call: LinearCall) -> tuple[int, int, int]:
    return call.dims.jL, call.dims.jC, call.dims.jR


def _turned(rows: Tensor, sides: tuple[int, int, int]) -> Tensor:
    """Whole rows ``[N, R C L]`` from rows ``[N, features]`` of sides (L, C, R), or nothing from
    nothing."""
    left, central, right = sides
    if rows.shape[-1] == 0:
        return rows
    size = left * central * right
    whole = pad(rows, (0, size - rows.shape[1])) if rows.shape[1] < size else rows
    return whole.view(len(rows), left, central, right).transpose(1, 3).reshape(len(rows), size)


def _restored(rows: Tensor, sides: tuple[int, int, int], features: int) -> Tensor:
    """The reverse, without padding."""
    return _turned(rows, (sides[2], sides[1], sides[0]))[..., :features].contiguous()


def _mirrored(call: _Call, **others: Any) -> _Call:
    """The mirrored call; ``others``: its other tensors."""
    ins = _in_sides(call)
    outs = _out_sides(call)
    return replace(
        call,
        x=_turned(call.x, ins),
        left=call.right.permute(_LEFT).contiguous(),
        central=call.central.permute(_CENTRAL).contiguous(),
        right=call.left.permute(_RIGHT).contiguous(),
        bias=None if call.bias is None else _turned(call.bias[None], outs)[0],
        in_features=ins[0] * ins[1] * ins[2],
        out_features=outs[0] * outs[1] * outs[2],
        strategy="half_left",
        **others,
    )


def mirrored_forward(
    call: ForwardCall, half_left: Callable[[ForwardCall], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`, by the forward of half_left."""
    y, h, z = half_left(_mirrored(call))
    sides = _out_sides(call)
    return _restored(y, sides, call.out_features), h, _restored(z, sides, call.out_features)


def mirrored_backward(
    call: BackwardCall, half_left: Callable[[BackwardCall], tuple[Tensor, ...]]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`, by the backward of
    half_left."""
    sides = _out_sides(call)
    x, left, central, right, bias = call.need
    turned = _mirrored(call, grad=_turned(call.grad, sides), saved=_turned(call.saved, sides))
    turned.need = [x, right, central, left, bias]
    dx, dright, dcentral, dleft, dbias = half_left(turned)
    return (
        _restored(dx, _in_sides(call), call.in_features),
        # The reverse of _RIGHT is _LEFT and the other way round; _CENTRAL is its own.
        dleft.permute(_LEFT).contiguous() if left else dleft,
        dcentral.permute(_CENTRAL).contiguous() if central else dcentral,
        dright.permute(_RIGHT).contiguous() if right else dright,
        _restored(dbias[None], sides, call.out_features)[0] if bias else dbias,
    )
