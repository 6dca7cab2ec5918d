"""Routing by the compiled kernels of csrc/cpu/routing/routing.h. Calls and results: see `call`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.native_library import (
    DTYPES,
    CombineArguments,
    DispatchArguments,
    RouteArguments,
    call_native,
    dense,
    dense_index,
    dense_offsets,
)
from mpoe_kernels.routing.call import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall


def _name(name: str, tensor: Tensor) -> bytes:
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16; got {describe(tensor)}")
    return DTYPES[tensor.dtype]


def _rows(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 axes; got {describe(tensor)}")
    return dense(name, tensor)


def _gates(top_k_weights: Tensor, index: Tensor, like: Tensor) -> Tensor:
    if top_k_weights.shape != index.shape:
        raise ValueError(f"top_k_weights must be {list(index.shape)}; got {describe(top_k_weights)}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return dense("top_k_weights", top_k_weights if top_k_weights.dtype == dtype else top_k_weights.to(dtype))


def route(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU looking at the entries costs no waiting, so they are checked."""
    index = dense_index("top_k_index", call.top_k_index, 2)
    tokens, top_k = index.shape
    arguments = RouteArguments(
        tokens=tokens,
        top_k=top_k,
        experts=call.num_experts,
        capacity=-1 if call.capacity is None else call.capacity,
        index=index.data_ptr(),
    )
    token_mask = call.token_mask
    if token_mask is not None:
        if token_mask.dtype != torch.bool or token_mask.shape != (tokens,):
            raise ValueError(f"token_mask must be bool [{tokens}]; got {describe(token_mask)}")
        mask = dense("token_mask", token_mask)
        arguments.token_mask = mask.data_ptr()
    offsets = index.new_empty(call.num_experts + 1, dtype=torch.int32)
    token_of_slot, slot_of_token = index.new_empty(tokens * top_k), index.new_empty((tokens, top_k))
    arguments.offsets = offsets.data_ptr()
    arguments.token_of_slot, arguments.slot_of_token = token_of_slot.data_ptr(), slot_of_token.data_ptr()
    call_native("mpoe_route", arguments)
    return offsets, token_of_slot, slot_of_token


def dispatch(call: DispatchCall) -> Tensor:
    """Slots past the last offset are zero."""
    x = call.x
    # Rows may lie apart, even overlap.
    apart = x.dim() == 2 and x.is_cpu and (x.stride(1) == 1 or x.shape[1] == 1)
    source = x if apart else _rows("x", x)
    index, offsets = dense_index("token_of_slot", call.token_of_slot, 1), dense_offsets(call.expert_offsets)
    (tokens, features), slots, element = source.shape, index.shape[0], source.element_size()
    out = source.new_empty((slots, features))
    call_native(
        "mpoe_dispatch",
        DispatchArguments(
            tokens=tokens,
            slots=slots,
            experts=offsets.shape[0] - 1,
            row_bytes=features * element,
            stride_bytes=source.stride(0) * element,
            offset_bytes=offsets.element_size(),
            x=source.data_ptr(),
            token_of_slot=index.data_ptr(),
            offsets=offsets.data_ptr(),
            out=out.data_ptr(),
        ),
    )
    return out


def _combined(rows: Tensor, index: Tensor, gates: Tensor | None, name: str) -> Tensor:
    (tokens, top_k), (slots, features) = index.shape, rows.shape
    out = rows.new_empty((tokens, features))
    call_native(
        "mpoe_combine",
        CombineArguments(
            dtype=_name(name, rows),
            tokens=tokens,
            top_k=top_k,
            slots=slots,
            features=features,
            slot_of_token=index.data_ptr(),
            gates=None if gates is None else gates.data_ptr(),
            rows=rows.data_ptr(),
            out=out.data_ptr(),
        ),
    )
    return out


def dispatch_backward(call: DispatchBackwardCall) -> Tensor:
    """Summed in float32 (float64 for float64)."""
    return _combined(_rows("grad", call.grad), dense_index("slot_of_token", call.slot_of_token, 2), None, "grad")


def combine(call: CombineCall) -> Tensor:
    """The gates keep their float32, the sum is rounded once."""
    rows, index = _rows("y_sorted", call.y_sorted), dense_index("slot_of_token", call.slot_of_token, 2)
    return _combined(rows, index, _gates(call.top_k_weights, index, rows), "y_sorted")


def combine_backward(call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gates in one pass."""
    grad, need_y, need_weights = call.grad, call.need_y, call.need_weights
    rows, index = _rows("y_sorted", call.y_sorted), dense_index("slot_of_token", call.slot_of_token, 2)
    (tokens, top_k), (slots, features) = index.shape, rows.shape
    if grad.shape != (tokens, features) or grad.dtype != rows.dtype:
        wanted = f"{str(rows.dtype).removeprefix('torch.')} {[tokens, features]}"
        raise ValueError(f"grad must be {wanted}; got {describe(grad)}")
    outer, gates = dense("grad", grad), _gates(call.top_k_weights, index, rows)
    dy = rows.new_empty(rows.shape if need_y else 0)
    dweights = gates.new_empty(gates.shape if need_weights else 0)
    call_native(
        "mpoe_combine_backward",
        CombineArguments(
            dtype=_name("y_sorted", rows),
            tokens=tokens,
            top_k=top_k,
            slots=slots,
            features=features,
            slot_of_token=index.data_ptr(),
            gates=gates.data_ptr(),
            rows=rows.data_ptr(),
            grad=outer.data_ptr(),
            drows=dy.data_ptr() if need_y else None,
            dgates=dweights.data_ptr() if need_weights else None,
        ),
    )
    return dy, dweights.to(call.top_k_weights.dtype)


ROUTING_KERNELS: dict[str, Callable[[Any], Any]] = {
    "route": route,
    "dispatch": dispatch,
    "dispatch_backward": dispatch_backward,
    "combine": combine,
    "combine_backward": combine_backward,
}
