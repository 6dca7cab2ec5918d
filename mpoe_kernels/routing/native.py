"""Routing by the compiled kernels of csrc/cpu/routing.h; same arguments and results as the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPS = torch.ops.mpoe_native


def route_forward(
    top_k_index: Tensor, num_experts: int, capacity: int | None, token_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `mpoe_kernels.routing.op.route`. On the CPU looking at the entries costs no waiting, so they are checked."""
    expert_offsets, token_of_slot, slot_of_token, bad = OPS.route(top_k_index, num_experts, capacity, token_mask)
    if bad >= 0:
        value = int(top_k_index.reshape(-1)[bad])
        message = f"top_k_index must lie in 0..{num_experts - 1}; got {value}"
        raise ValueError(message)  # reached only with the native kernels, which have a stage of their own in CI
    return expert_offsets, token_of_slot, slot_of_token


def dispatch_forward(x: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[T, I] -> [N, I]``; slots past the last offset are zero."""
    return OPS.dispatch(x, expert_offsets, token_of_slot)


def dispatch_backward(grad: Tensor, slot_of_token: Tensor) -> Tensor:
    """``[N, I] -> [T, I]``, summed in float32 (float64 for float64)."""
    return OPS.dispatch_backward(grad, slot_of_token)


def combine_forward(
    y_sorted: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor, top_k_weights: Tensor
) -> Tensor:
    """``[N, F] -> [T, F]``, gated; the gates keep their float32, the sum is rounded once."""
    return OPS.combine(y_sorted, slot_of_token, top_k_weights)


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
    dy, dweights = OPS.combine_backward(grad, y_sorted, slot_of_token, top_k_weights, need_y, need_weights)
    return dy if need_y else grad.new_empty(0), dweights if need_weights else grad.new_empty(0)


ROUTING_KERNELS: dict[str, Callable[..., Any]] = {
    "route": route_forward,
    "dispatch": dispatch_forward,
    "dispatch_backward": dispatch_backward,
    "combine": combine_forward,
    "combine_backward": combine_backward,
}
