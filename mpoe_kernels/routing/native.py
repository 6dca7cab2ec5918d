"""Routing by the compiled kernels of csrc/cpu/routing/routing.h. Calls and results: see `op`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.native_library import NATIVE_LIBRARY, address, dense, dense_index, name_of

if TYPE_CHECKING:
    from mpoe_kernels.routing.op import (
        CombineBackwardCall,
        CombineCall,
        DispatchBackwardCall,
        DispatchCall,
        RouteCall,
    )


def _gates(top_k_weights: Tensor, like: Tensor) -> Tensor:
    gates = dense("top_k_weights", top_k_weights)
    return gates.to(torch.float64 if like.dtype == torch.float64 else torch.float32)


def route(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU looking at the entries costs no waiting, so they are checked."""
    index = dense_index("top_k_index", call.top_k_index)
    mask = call.token_mask
    tokens, top_k = index.shape
    if mask is not None:
        mask = dense("token_mask", mask)
    offsets = index.new_empty(call.num_experts + 1, dtype=torch.int32)
    token_of_slot = index.new_empty(tokens * top_k)
    slot_of_token = torch.empty_like(index)
    NATIVE_LIBRARY.functions.route(
        tokens,
        top_k,
        call.num_experts,
        -1 if call.capacity is None else call.capacity,
        index.data_ptr(),
        address(mask),
        offsets.data_ptr(),
        token_of_slot.data_ptr(),
        slot_of_token.data_ptr(),
    )
    return offsets, token_of_slot, slot_of_token


def dispatch(call: DispatchCall) -> Tensor:
    """Slots past the last offset are zero."""
    x = call.x
    # Rows may lie apart, even overlap.
    if not x.is_cpu or (x.stride(1) != 1 and x.shape[1] != 1):
        x = dense("x", x)
    index = dense_index("token_of_slot", call.token_of_slot)
    offsets = dense("expert_offsets", call.expert_offsets)
    tokens, features = x.shape
    slots = len(index)
    element = x.itemsize
    out = x.new_empty(slots, features)
    NATIVE_LIBRARY.functions.dispatch(
        tokens,
        slots,
        len(offsets) - 1,
        features * element,
        x.stride(0) * element,
        offsets.itemsize,
        x.data_ptr(),
        index.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
    )
    return out


def _combined(rows: Tensor, index: Tensor, gates: Tensor | None) -> Tensor:
    out = rows.new_empty(len(index), rows.shape[1])
    memory = (index.data_ptr(), address(gates), rows.data_ptr(), out.data_ptr())
    NATIVE_LIBRARY.functions.combine(name_of(rows.dtype), (*index.shape, *rows.shape), *memory)
    return out


def dispatch_backward(call: DispatchBackwardCall) -> Tensor:
    """Summed in float32 (float64 for float64)."""
    grad = dense("grad", call.grad)
    index = dense_index("slot_of_token", call.slot_of_token)
    return _combined(grad, index, None)


def combine(call: CombineCall) -> Tensor:
    """The gates keep their float32, the sum is rounded once."""
    rows = dense("y_sorted", call.y_sorted)
    index = dense_index("slot_of_token", call.slot_of_token)
    return _combined(rows, index, _gates(call.top_k_weights, rows))


def combine_backward(call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gates in one pass."""
    rows = dense("y_sorted", call.y_sorted)
    index = dense_index("slot_of_token", call.slot_of_token)
    grad = dense("grad", call.grad)
    gates = _gates(call.top_k_weights, rows)
    dy = rows.new_empty(0)
    dweights = gates.new_empty(0)
    if call.need_y:
        dy = torch.empty_like(rows)
    if call.need_weights:
        dweights = torch.empty_like(gates)
    memory = [tensor.data_ptr() for tensor in (index, gates, rows, grad, dy, dweights)]
    NATIVE_LIBRARY.functions.combine_backward(
        name_of(rows.dtype), (*index.shape, *rows.shape), *memory
    )
    return dy, dweights.to(call.top_k_weights.dtype)
