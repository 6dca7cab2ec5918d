"""Grouped MPO linear by the compiled kernels of csrc/cpu/linear/linear.h."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract.orders import BlockDims, exchanged, meets_half_first
from mpoe_kernels.contract.plan import Contraction
from mpoe_kernels.linear.gradients import Backward, Forward
from mpoe_kernels.linear.mirrored import mirrored_backward, mirrored_forward
from mpoe_kernels.native_library import (
    NATIVE_LIBRARY,
    address,
    dense,
    dense_index,
    dense_like,
    name_of,
)

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

# As csrc/bindings/linear.cpp numbers them.
OPERANDS = ("L", "C", "R")
DTYPES = (torch.float32, torch.bfloat16)


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the native kernels cannot compute a contraction."""
    if plan.dtype in DTYPES:
        return []
    return [f"it runs on float32 and bfloat16, not on {str(plan.dtype).removeprefix('torch.')}"]


@lru_cache(maxsize=1024)
def _sizes(
    dtype: torch.dtype, activation: str, strategy: str, experts: int, dims: BlockDims
) -> Any:
    """What does not change from call to call, checked once: the library's LinearSizes."""
    *axes, _, _ = dims
    if experts == 0 or 0 in axes:
        raise ValueError("blocks must not have an axis of size 0")
    return NATIVE_LIBRARY.functions.LinearSizes(
        name_of(dtype),
        activation,
        strategy,
        experts,
        tuple(dims),
        [OPERANDS.index(operand) for operand in dims.chain_order],
        meets_half_first(dims, strategy),
        meets_half_first(exchanged(dims), strategy),
    )


def linear_sizes(call: LinearCall) -> Any:
    """The library's LinearSizes for a call whose strategy is chosen."""
    return _sizes(call.x.dtype, call.activation, call.strategy, call.num_experts, call.dims)


def dense_blocks(call: LinearCall) -> tuple[Tensor, Tensor, Tensor]:
    """Dense left, central and right."""
    return dense("left", call.left), dense("central", call.central), dense("right", call.right)


class _Inputs(NamedTuple):
    """What both passes give the library.

    Attributes:
        arguments: the first ones of its functions.
        operands: x, left, central and right, to which the arguments point.
        indices: the offsets and rows, likewise; the caller keeps both until the library returns.
        slots: N.
    """

    arguments: tuple[Any, ...]
    operands: tuple[Tensor, Tensor, Tensor, Tensor]
    indices: tuple[Tensor, Tensor | None]
    slots: int


def _inputs(call: LinearCall) -> _Inputs:
    sizes = linear_sizes(call)
    left, central, right = dense_blocks(call)
    x = dense("x", call.x)
    offsets = dense("expert_offsets", call.expert_offsets)
    tokens = len(x)
    rows = None
    slots = tokens
    if call.row_index is not None:
        rows = dense_index("row_index", call.row_index)
        slots = len(rows)
        if slots == 0:
            # an empty tensor has address 0, which the library reads as "every slot its own row"
            rows = rows.new_zeros(1)
    blocks = (left.data_ptr(), central.data_ptr(), right.data_ptr())
    arguments = (
        sizes,
        tokens,
        slots,
        offsets.itemsize,
        x.data_ptr(),
        blocks,
        offsets.data_ptr(),
        address(rows),
    )
    return _Inputs(arguments, (x, left, central, right), (offsets, rows), slots)


def candidates(plan: Contraction) -> list[Candidate]:
    """The kernels of the plan's strategy; half_right is the half_left of a mirrored problem."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    return [Candidate("native", plan.strategy, plan.strategy, run)]


def linear_forward(call: ForwardCall) -> Forward:
    """``(y, h, z)``, see `ForwardCall`."""
    if call.strategy == "half_right":
        return mirrored_forward(call, linear_forward)
    inputs = _inputs(call)
    slots = inputs.slots
    x = call.x
    bias = None
    if call.bias is not None:
        bias = dense("bias", call.bias)
    y = x.new_empty(slots, call.out_features)
    h = x.new_empty(0)
    if call.saves_h:
        h = x.new_empty(slots * call.dims.jC, call.dims.b)
    z = x.new_empty(0)
    if call.saves_z:
        z = torch.empty_like(y)
    # An empty tensor has address 0, which the library reads as "not saved".
    results = (y.data_ptr(), h.data_ptr(), z.data_ptr())
    NATIVE_LIBRARY.functions.linear_forward(*inputs.arguments, address(bias), *results)
    return y, h, z


def linear_backward(call: BackwardCall) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    if call.strategy == "half_right":
        return mirrored_backward(call, linear_backward)
    inputs = _inputs(call)
    slots = inputs.slots
    x = inputs.operands[0]
    grad = dense("grad", call.grad)
    h = saved = None
    if call.strategy == "separable":
        h = dense_like("h", call.h, (slots * call.dims.jC, call.dims.b), x.dtype)
    if call.activation != "none":
        # A raw forward that was told to save nothing comes here with an empty one.
        saved = dense_like("saved", call.saved, tuple(grad.shape), grad.dtype)
    *needed, needs_bias = call.need
    results = []
    for operand, need in zip(inputs.operands, needed, strict=True):
        result = torch.empty_like(operand) if need else x.new_empty(0)
        results.append(result)
    results.append(x.new_empty(call.out_features if needs_bias else 0))
    # An empty gradient has address 0, which the library reads as "not wanted".
    memory = (
        grad.data_ptr(),
        address(h),
        address(saved),
        [result.data_ptr() for result in results],
    )
    NATIVE_LIBRARY.functions.linear_backward(*inputs.arguments, *memory)
    dx, dleft, dcentral, dright, dbias = results
    return dx, dleft, dcentral, dright, dbias
