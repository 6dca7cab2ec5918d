"""Routing without host synchronisation: stable sorts, searches and gathers of fixed size. Calls:
see `op`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.checks import check_range

if TYPE_CHECKING:
    from mpoe_kernels.routing.op import (
        CombineBackwardCall,
        CombineCall,
        DispatchBackwardCall,
        DispatchCall,
        RouteCall,
    )


def _stable_order(keys: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable argsort of expert numbers and the offsets ``[E + 1]`` of every expert in it."""
    ordered, order = torch.sort(keys, stable=True)
    boundaries = torch.arange(num_experts + 1, device=keys.device, dtype=keys.dtype)
    return order, torch.searchsorted(ordered, boundaries, out_int32=True)


def route(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    """Key E marks a pair that is masked or dropped."""
    num_experts = call.num_experts
    keys = call.top_k_index
    tokens, top_k = keys.shape
    if call.token_mask is not None:
        keys = keys.masked_fill(~call.token_mask[:, None], num_experts)
    if call.capacity is not None:
        # Capacity goes to first choices before second ones: count in [K, T] order.
        by_choice = keys.T.reshape(-1)
        order, offsets = _stable_order(by_choice, num_experts)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        starts = offsets.long()[by_choice.clamp(0, num_experts)]
        full = rank - starts >= call.capacity
        full = full.view(top_k, tokens).T
        keys = keys.masked_fill(full, num_experts)
    order, offsets = _stable_order(keys.reshape(-1), num_experts)
    check_range("top_k_index", call.top_k_index, 0, num_experts - 1)
    slot_of_token = torch.empty_like(order)
    slot_of_token[order] = torch.arange(order.numel(), device=order.device)
    slot_of_token = slot_of_token.view(tokens, top_k)
    slot_of_token = slot_of_token.masked_fill(keys == num_experts, -1)
    return offsets, order // top_k, slot_of_token


def dispatch(call: DispatchCall) -> Tensor:
    """Slots past the last offset are zero, whatever their token holds."""
    check_range("token_of_slot", call.token_of_slot, 0, call.x.shape[0] - 1)
    rows = call.x.index_select(0, call.token_of_slot)
    number = torch.arange(len(rows), device=rows.device)
    is_empty = number >= call.expert_offsets[-1]
    return rows.masked_fill_(is_empty[:, None], 0)


def _rows_of_pairs(rows: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[N, F] -> [T, K, F]``; a pair without a slot gets any row."""
    check_range("slot_of_token", slot_of_token, -1, rows.shape[0] - 1)
    slots = slot_of_token.clamp_min(0).reshape(-1)
    return rows.index_select(0, slots).view(*slot_of_token.shape, rows.shape[1])


def dispatch_backward(call: DispatchBackwardCall) -> Tensor:
    """A gather over slots, so it is deterministic."""
    rows = _rows_of_pairs(call.grad, call.slot_of_token)
    dropped = call.slot_of_token < 0
    rows.masked_fill_(dropped.unsqueeze(2), 0)
    return rows.sum(1)


def combine(call: CombineCall) -> Tensor:
    """Dropped pairs contribute nothing, even if their slot holds NaN."""
    rows = _rows_of_pairs(call.y_sorted, call.slot_of_token)
    # Masked last: neither the row nor the weight of a dropped pair may reach the sum, whatever they
    # hold.
    weights = call.top_k_weights.to(rows.dtype)
    dropped = call.slot_of_token < 0
    rows.mul_(weights.unsqueeze(2))
    rows.masked_fill_(dropped.unsqueeze(2), 0)
    if rows.shape[1] == 1:
        return rows.squeeze(1)
    return rows.sum(1)


def combine_backward(call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
    """The gradient of the rows by slot, that of the gates by pair."""
    grad = call.grad
    y_sorted = call.y_sorted
    slot_of_token = call.slot_of_token
    check_range("slot_of_token", slot_of_token, -1, y_sorted.shape[0] - 1)
    dropped = slot_of_token < 0
    dy = grad.new_empty(0)
    dweights = grad.new_empty(0)
    if call.need_y:
        # Weight of every slot; slots that no pair kept stay at zero.
        slots = y_sorted.shape[0]
        weight_of_slot = torch.zeros(slots + 1, dtype=grad.dtype, device=grad.device)
        target = torch.where(dropped, slots, slot_of_token).reshape(-1)
        weights = call.top_k_weights.to(grad.dtype)
        weight_of_slot[target] = weights.reshape(-1)
        kept = torch.zeros(slots + 1, dtype=torch.bool, device=grad.device)
        kept[target] = True
        dy = grad.index_select(0, call.token_of_slot)
        dy.mul_(weight_of_slot[:slots, None])
        dy.masked_fill_(~kept[:slots, None], 0)
    if call.need_weights:
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        rows = _rows_of_pairs(y_sorted, slot_of_token).to(accumulate)
        products = rows * grad.to(accumulate).unsqueeze(1)
        dots = products.sum(2)
        dots.masked_fill_(dropped, 0)
        dweights = dots.to(call.top_k_weights.dtype)
    return dy, dweights
