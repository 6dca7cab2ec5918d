"""Grouped MPO linear by the compiled kernels of csrc/cpu/linear/linear.h."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.checks import no_autocast
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
AROUND_PRODUCT = "separable around PyTorch's product"


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
    """The kernels of the plan's strategy; half_right is the half_left of a mirrored problem. Of a
    separable shape also with PyTorch's product with the shared block, which is faster on some
    processors."""
    run: Callable = linear_forward if plan.phase == "forward" else linear_backward
    offered = [Candidate("native", plan.strategy, plan.strategy, run)]
    if plan.strategy == "separable" and may_take_product(plan.dims, plan.dtype):
        around = partial(run, around_product=True)
        offered.append(Candidate("native", AROUND_PRODUCT, plan.strategy, around))
    return offered


def may_take_product(dims: BlockDims, dtype: torch.dtype) -> bool:
    """Whether rows beside the shared block are whole units of the kernels, pairs of bfloat16."""
    unit = 4 // dtype.itemsize
    return dims.a * dims.iC % unit == 0 and dims.b % unit == 0


def _product(multiply: Callable[[], object], *rows: Tensor) -> tuple[Callable, list[int]]:
    """As the library takes it: what it calls, and t, dh and dt."""

    def multiply_without_gradient() -> None:
        # a parameter may not be multiplied into given memory otherwise
        with torch.no_grad(), no_autocast(torch.device("cpu")):
            multiply()

    addresses = [row.data_ptr() for row in rows]
    return multiply_without_gradient, addresses + [0] * (3 - len(rows))


def linear_forward(call: ForwardCall, around_product: bool = False) -> Forward:
    """``(y, h, z)``, see `ForwardCall`; ``around_product``: PyTorch multiplies with central."""
    if call.strategy == "half_right":
        return mirrored_forward(call, linear_forward)
    inputs = _inputs(call)
    slots = inputs.slots
    x = call.x
    bias = None
    if call.bias is not None:
        bias = dense("bias", call.bias)
    y = x.new_empty(slots, call.out_features)
    dims = call.dims
    h = x.new_empty(0)
    if call.saves_h or around_product:
        h = x.new_empty(slots * dims.jC, dims.b)
    product = None
    filled = int(call.expert_offsets[-1])
    if around_product and filled:
        t = x.new_empty(slots, dims.a * dims.iC)
        after = h.view(slots, dims.jC * dims.b)[:filled]
        central = inputs.operands[2].view(t.shape[1], after.shape[1])
        multiply = partial(torch.mm, t[:filled], central, out=after)
        product = _product(multiply, t)
    z = x.new_empty(0)
    if call.saves_z:
        z = torch.empty_like(y)
    # An empty tensor has address 0, which the library reads as "not saved".
    results = (y.data_ptr(), h.data_ptr(), z.data_ptr())
    NATIVE_LIBRARY.functions.linear_forward(*inputs.arguments, address(bias), *results, product)
    if not call.saves_h:
        h = x.new_empty(0)
    return y, h, z


def linear_backward(call: BackwardCall, around_product: bool = False) -> Backward:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`; ``around_product``: PyTorch
    multiplies with central."""
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
    dx, dleft, dcentral, dright, dbias = results
    product = None
    filled = int(call.expert_offsets[-1])
    if around_product and filled:
        central = inputs.operands[2].flatten(0, 1).flatten(1)
        t = x.new_empty(slots, central.shape[0])
        dh = x.new_empty(slots, central.shape[1])
        dt = torch.empty_like(t)
        needs_x, needs_left, needs_central, _ = needed

        def multiply() -> None:
            if needs_central:
                torch.mm(t[:filled].T, dh[:filled], out=dcentral.view_as(central))
            if needs_x or needs_left:
                torch.mm(dh[:filled], central.T, out=dt[:filled])

        product = _product(multiply, t, dh, dt)
    NATIVE_LIBRARY.functions.linear_backward(*inputs.arguments, *memory, product)
    return dx, dleft, dcentral, dright, dbias
