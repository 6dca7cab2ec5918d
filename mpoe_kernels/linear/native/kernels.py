"""Grouped MPO linear by the compiled kernels of csrc/cpu/linear/linear.h."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.contract.orders import BlockDims, exchanged, meets_half_first
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.call import BackwardCall, ForwardCall, LinearCall
from mpoe_kernels.native_library import (
    DTYPES,
    LinearArguments,
    call_native,
    dense,
    dense_index,
    dense_like,
    dense_offsets,
)

# As csrc/interface.h numbers them.
OPERANDS = ("L", "C", "R")
BLOCK_SIZES = ("iL", "jL", "a", "iC", "jC", "b", "iR", "jR")
COMPUTED = (torch.float32, torch.bfloat16)
# Strategies with a kernel, by phase: the table kStrategies of csrc/linear_ops.cpp.
IMPLEMENTED: dict[str, tuple[str, ...]] = {
    "forward": ("separable", "rebuild", "half_left", "half_right", "chain"),
    "backward": ("separable", "rebuild", "half_left", "half_right", "chain"),
}


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the native kernels cannot compute a contraction."""
    reasons = []
    if plan.dtype not in COMPUTED:
        reasons.append(f"it runs on float32 and bfloat16, not on {str(plan.dtype).removeprefix('torch.')}")
    if plan.strategy not in IMPLEMENTED[plan.phase]:
        reasons.append(f"it has no {plan.phase} kernel for the strategy {plan.strategy!r}")
    return reasons


@lru_cache(maxsize=1024)
def _arguments(
    dtype: torch.dtype,
    activation: str,
    strategy: str,
    in_features: int,
    out_features: int,
    left: tuple[int, ...],
    central: tuple[int, ...],
    right: tuple[int, ...],
) -> LinearArguments:
    """The arguments that do not change from call to call, checked once: a call copies them and adds its addresses."""
    if not (len(left) == len(central) == len(right) == 4):
        raise ValueError(f"left, central and right must have 4 axes; got {len(left)}, {len(central)}, {len(right)}")
    if 0 in (*left, *central, *right):
        raise ValueError("blocks must not have an axis of size 0")
    (experts, iL, jL, a), (iC, jC, b), (iR, jR) = left, central[1:], right[2:]
    if central[0] != a or right[:2] != (experts, b):
        raise ValueError(
            "blocks must be left [E, iL, jL, a], central [a, iC, jC, b], right [E, b, iR, jR]; "
            f"got {list(left)}, {list(central)}, {list(right)}"
        )
    dims = BlockDims(iL, jL, a, iC, jC, b, iR, jR, in_features, out_features)
    first, second, third = (OPERANDS.index(operand) for operand in dims.chain_order)
    return LinearArguments(
        dtype=DTYPES.get(dtype, str(dtype).encode()),
        activation=activation.encode(),
        strategy=strategy.encode(),
        in_features=in_features,
        out_features=out_features,
        experts=experts,
        **dict(zip(BLOCK_SIZES, (iL, jL, a, iC, jC, b, iR, jR), strict=True)),
        chain_first=first,
        chain_second=second,
        chain_third=third,
        half_first=meets_half_first(dims, strategy),
        transposed_half_first=meets_half_first(exchanged(dims), strategy),
    )


def fixed_arguments(call: LinearCall) -> LinearArguments:
    """A copy of the arguments that do not change from call to call; the strategy must have been chosen.

    Raises:
        ValueError: blocks that do not fit.
    """
    sizes = (call.in_features, call.out_features, call.left.shape, call.central.shape, call.right.shape)
    return LinearArguments.from_buffer_copy(_arguments(call.x.dtype, call.activation, call.strategy, *sizes))


def _inputs(call: LinearCall) -> tuple[LinearArguments, tuple[Tensor | None, ...]]:
    """Arguments of both passes, and the tensors that they point to, which the caller must keep until the call
    returns."""
    x, left, central, right = dense("x", call.x), call.left, call.central, call.right
    dtype = x.dtype
    for name, block in (("left", left), ("central", central), ("right", right)):
        if block.dtype != dtype:
            raise ValueError(f"{name} must have the dtype of x; got {describe(block)}, x is {describe(x)}")
    arguments = fixed_arguments(call)
    if x.dim() != 2 or x.shape[1] != call.in_features:
        raise ValueError(f"x must be [T, {call.in_features}]; got {describe(x)}")
    left, central, right = dense("left", left), dense("central", central), dense("right", right)
    offsets = dense_offsets(call.expert_offsets)
    if offsets.shape[0] != arguments.experts + 1:
        raise ValueError(f"expert_offsets must be [{arguments.experts + 1}]; got {describe(offsets)}")
    arguments.tokens = arguments.slots = x.shape[0]
    arguments.x, arguments.left = x.data_ptr(), left.data_ptr()
    arguments.central, arguments.right = central.data_ptr(), right.data_ptr()
    arguments.offsets, arguments.offset_bytes = offsets.data_ptr(), offsets.element_size()
    rows = None
    if call.row_index is not None:
        rows = dense_index("row_index", call.row_index, 1)
        arguments.slots, arguments.rows = rows.shape[0], rows.data_ptr()
    return arguments, (x, left, central, right, offsets, rows)


def linear_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`."""
    arguments, _kept = _inputs(call)
    x, slots, out_features = call.x, arguments.slots, call.out_features
    if call.bias is not None:
        bias = dense_like("bias", call.bias, (out_features,), x.dtype)
        arguments.bias = bias.data_ptr()
    y = x.new_empty((slots, out_features))
    arguments.y = y.data_ptr()
    h = z = None
    if call.saves_h:
        h = x.new_empty((slots * arguments.jC, arguments.b))
        arguments.h = h.data_ptr()
    if call.saves_z:
        z = x.new_empty((slots, out_features))
        arguments.z = z.data_ptr()
    call_native("mpoe_linear_forward", arguments)
    return y, x.new_empty(0) if h is None else h, x.new_empty(0) if z is None else z


def linear_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    arguments, _kept = _inputs(call)
    x, slots, out_features = call.x, arguments.slots, call.out_features
    grad = dense_like("grad", call.grad, (slots, out_features), x.dtype)
    arguments.grad = grad.data_ptr()
    if call.activation != "none":
        saved = dense_like("saved", call.saved, (slots, out_features), x.dtype)
        arguments.kept_value = saved.data_ptr()
    if call.strategy == "separable":
        h = dense_like("h", call.h, (slots * arguments.jC, arguments.b), x.dtype)
        arguments.kept_h = h.data_ptr()
    shapes = (x.shape, call.left.shape, call.central.shape, call.right.shape, (out_features,))
    results = []
    for name, shape, needed in zip(("dx", "dleft", "dcentral", "dright", "dbias"), shapes, call.need, strict=True):
        result = x.new_empty(shape if needed else 0)
        results.append(result)
        if needed:
            setattr(arguments, name, result.data_ptr())
    call_native("mpoe_linear_backward", arguments)
    dx, dleft, dcentral, dright, dbias = results
    return dx, dleft, dcentral, dright, dbias
