"""Routing by loops over tokens."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor


def route_reference(
    top_k_index: Tensor,
    num_experts: int,
    capacity: int | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(expert_offsets, token_of_slot, slot_of_token)``: first choices claim capacity before
    second choices do."""
    tokens, top_k = top_k_index.shape
    index = top_k_index.tolist()
    kept: set[tuple[int, int]] = set()
    used = [0] * num_experts
    for k in range(top_k):
        for t in range(tokens):
            if token_mask is not None and not bool(token_mask[t]):
                continue
            e = index[t][k]
            if capacity is None or used[e] < capacity:
                used[e] += 1
                kept.add((t, k))
    pairs = list(product(range(tokens), range(top_k)))
    offsets = [0]
    order = []
    for e in range(num_experts):
        for t, k in pairs:
            if (t, k) in kept and index[t][k] == e:
                order.append((t, k))
        offsets.append(len(order))
    slot_of_token = torch.full((tokens, top_k), -1, dtype=torch.int64)
    for slot, (t, k) in enumerate(order):
        slot_of_token[t, k] = slot
    order += [pair for pair in pairs if pair not in kept]
    token_of_slot = torch.tensor([t for t, _ in order], dtype=torch.int64)
    return torch.tensor(offsets, dtype=torch.int32), token_of_slot, slot_of_token


def dispatch_reference(x: Tensor, routing) -> Tensor:
    """``x_sorted[s] = x[token_of_slot[s]]`` for filled slots, zero for the rest."""
    filled = int(routing.expert_offsets[-1])
    is_filled = torch.arange(len(routing.token_of_slot), device=x.device) < filled
    rows = x[routing.token_of_slot.long()]
    return torch.where(is_filled[:, None], rows, x.new_zeros(()))


def combine_reference(y_sorted: Tensor, routing, top_k_weights: Tensor) -> Tensor:
    """``y[t] = sum_k gate[t, k] * y_sorted[slot_of_token[t, k]]`` over kept pairs."""
    tokens, top_k = routing.slot_of_token.shape
    rows = []
    for t in range(tokens):
        row = y_sorted.new_zeros(y_sorted.shape[1])
        for k in range(top_k):
            slot = int(routing.slot_of_token[t, k])
            if slot >= 0:
                row = row + top_k_weights[t, k].to(y_sorted.dtype) * y_sorted[slot]
        rows.append(row)
    if rows:
        return torch.stack(rows)
    return y_sorted.new_zeros(0, y_sorted.shape[1])
