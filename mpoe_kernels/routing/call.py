"""What the kernels of `route`, `dispatch` and `combine` are called with, on every backend.

These classes are the ops' signatures: the schemas follow from their fields. T tokens choose K experts each; N = T * K
slots, sorted by expert, see `mpoe_kernels.routing.op.Routing`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class RouteCall:
    """Its kernel returns ``(expert_offsets, token_of_slot, slot_of_token)``.

    Attributes:
        top_k_index: int64 ``[T, K]``.
        num_experts: E.
        capacity: most slots of an expert, or None.
        token_mask: bool ``[T]`` or None; ``False``: a token that is not routed.
        backend: the one that was asked for, or ``"auto"``.
    """

    top_k_index: Tensor
    num_experts: int
    capacity: int | None
    token_mask: Tensor | None
    backend: str


@dataclass
class DispatchCall:
    """Its kernel returns the rows in slot order, ``[N, I]``; slots past the last offset are zero.

    Attributes:
        x: ``[T, I]``.
        expert_offsets, token_of_slot, slot_of_token: of a `Routing`.
        backend: as in `RouteCall`.
    """

    x: Tensor
    expert_offsets: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor
    backend: str


@dataclass
class DispatchBackwardCall:
    """Its kernel returns the gradient ``[T, I]`` of x, every row a sum over its slots in a fixed order.

    Attributes:
        grad: ``[N, I]``.
        slot_of_token: int64 ``[T, K]``; -1: no slot.
        backend: as in `RouteCall`.
    """

    grad: Tensor
    slot_of_token: Tensor
    backend: str


@dataclass
class CombineCall:
    """Its kernel returns ``[T, F]``, the gated sum of a token's rows; pairs without a slot contribute nothing.

    Attributes:
        y_sorted: ``[N, F]``.
        expert_offsets, token_of_slot, slot_of_token: of a `Routing`.
        top_k_weights: gates, floating ``[T, K]``.
        backend: as in `RouteCall`.
    """

    y_sorted: Tensor
    expert_offsets: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor
    top_k_weights: Tensor
    backend: str


@dataclass
class CombineBackwardCall:
    """Its kernel returns the gradients of ``y_sorted`` and ``top_k_weights``; what is not needed is empty.

    Attributes:
        grad: ``[T, F]``.
        y_sorted, token_of_slot, slot_of_token, top_k_weights: as in `CombineCall`.
        need_y, need_weights: which gradients.
        backend: as in `RouteCall`.
    """

    grad: Tensor
    y_sorted: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor
    top_k_weights: Tensor
    need_y: bool
    need_weights: bool
    backend: str
