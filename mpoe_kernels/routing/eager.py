"""Routing without host synchronisation: stable sorts, searches and gathers of fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.indices import check_range


def _stable_order(keys: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable argsort of expert numbers and the offsets ``[E + 1]`` of every expert in it."""
    ordered, order = torch.sort(keys, stable=True)
    boundaries = torch.arange(num_experts + 1, device=keys.device, dtype=keys.dtype)
    return order, torch.searchsorted(ordered, boundaries, out_int32=True)


def route_forward(
    top_k_index: Tensor, num_experts: int, capacity: int | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mpoe_kernels.routing.op.route`. Key E marks a pair that is masked or dropped."""
    tokens, top_k = top_k_index.shape
    if top_k < 1:
        raise ValueError(f"top_k_index must be [T, K] with K >= 1; got {describe(top_k_index)}")
    check_range("top_k_index", top_k_index, 0, num_experts - 1)
    keys = top_k_index
    if token_mask is not None:
        keys = keys.masked_fill(~token_mask[:, None], num_experts)
    if capacity is not None:
        # Capacity goes to first choices before second ones: count in [K, T] order.
        by_choice = keys.T.reshape(-1)
        order, offsets = _stable_order(by_choice, num_experts)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        starts = torch.cat([offsets, offsets[-1:]]).long()[by_choice]
        full = (rank - starts >= capacity).view(top_k, tokens).T
        keys = keys.masked_fill(full, num_experts)
    order, offsets = _stable_order(keys.reshape(-1), num_experts)
    slot_of_token = torch.empty_like(order)
    slot_of_token[order] = torch.arange(order.numel(), device=order.device)
    slot_of_token = slot_of_token.view(tokens, top_k).masked_fill(keys == num_experts, -1)
    return offsets, order // top_k, slot_of_token


def _filled(expert_offsets: Tensor, slots: int) -> Tensor:
    """``[N, 1]`` mask of slots before the last offset."""
    return (torch.arange(slots, device=expert_offsets.device) < expert_offsets[-1]).unsqueeze(1)


def dispatch_forward(x: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[T, I] -> [N, I]``; slots past the last offset are zero, whatever their token holds."""
    check_range("token_of_slot", token_of_slot, 0, x.shape[0] - 1)
    rows = x.index_select(0, token_of_slot)
    return rows.masked_fill_(~_filled(expert_offsets, rows.shape[0]), 0)


def dispatch_backward(grad: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[N, I] -> [T, I]``: a gather over slots, so it is deterministic."""
    check_range("slot_of_token", slot_of_token, -1, grad.shape[0] - 1)
    tokens, top_k = slot_of_token.shape
    rows = grad.index_select(0, slot_of_token.clamp_min(0).reshape(-1)).view(tokens, top_k, grad.shape[1])
    return rows.masked_fill_((slot_of_token < 0).unsqueeze(2), 0).sum(1)


def combine_forward(
    y_sorted: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``[N, F] -> [T, F]``, gated; dropped pairs contribute nothing, even if their slot holds NaN."""
    check_range("slot_of_token", slot_of_token, -1, y_sorted.shape[0] - 1)
    tokens, top_k = slot_of_token.shape
    dropped = (slot_of_token < 0).unsqueeze(2)
    rows = y_sorted.index_select(0, slot_of_token.clamp_min(0).reshape(-1)).view(tokens, top_k, y_sorted.shape[1])
    # Masked last: neither the row nor the weight of a dropped pair may reach the sum, whatever they hold.
    rows = rows.mul_(top_k_weights.to(rows.dtype).unsqueeze(2)).masked_fill_(dropped, 0)
    return rows.squeeze(1) if top_k == 1 else rows.sum(1)


def combine_backward(
    grad: Tensor,
    y_sorted: Tensor,
    token_of_slot: Tensor,
    slot_of_token: Tensor,
    top_k_weights: Tensor,
    need_y: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``y_sorted`` and ``top_k_weights``; an empty tensor where none is needed."""
    check_range("slot_of_token", slot_of_token, -1, y_sorted.shape[0] - 1)
    tokens, top_k = slot_of_token.shape
    dropped = slot_of_token < 0
    dy = dweights = grad.new_empty(0)
    safe = slot_of_token.clamp_min(0).reshape(-1)
    if need_y:
        # Weight of every slot; slots that no pair kept stay at zero.
        slots = y_sorted.shape[0]
        weight_of_slot = torch.zeros(slots + 1, dtype=grad.dtype, device=grad.device)
        target = torch.where(dropped, slots, slot_of_token).reshape(-1)
        weight_of_slot[target] = top_k_weights.to(grad.dtype).reshape(-1)
        kept = torch.zeros(slots + 1, dtype=torch.bool, device=grad.device)
        kept[target] = True
        dy = grad.index_select(0, token_of_slot).mul_(weight_of_slot[:slots, None])
        dy.masked_fill_(~kept[:slots, None], 0)
    if need_weights:
        rows = y_sorted.index_select(0, safe).view(tokens, top_k, y_sorted.shape[1])
        accumulate = torch.float64 if grad.dtype == torch.float64 else torch.float32
        dots = (rows.to(accumulate) * grad.to(accumulate).unsqueeze(1)).sum(2)
        dweights = dots.masked_fill_(dropped, 0).to(top_k_weights.dtype)
    return dy, dweights
