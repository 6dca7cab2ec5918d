"""`route`, `dispatch`, `combine`: tokens to slots sorted by expert, and back. No host
synchronisation."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import add_kernels, lazily
from mpoe_kernels.checks import (
    check_device,
    check_floating,
    check_index,
    check_integer,
    check_tensor,
    describe,
    refuse_jit_trace,
)
from mpoe_kernels.cuda_library import CUDA_OPS
from mpoe_kernels.define import define_op, requested_backend
from mpoe_kernels.routing import eager, native
from mpoe_kernels.routing.cuda import RoutingKernels
from mpoe_kernels.signatures import MOST_PAIRS, as_index

OPS = ("route", "dispatch", "dispatch_backward", "combine", "combine_backward")
GATING = ("router_logits", "gate", "gate_backward")  # of `mpoe_kernels.routing.gating`
KERNELS = {
    "native": native,
    "eager": eager,
    "triton": lazily("mpoe_kernels.routing.triton", *OPS),
    "cuda": RoutingKernels(CUDA_OPS),
}
FUNCTIONS = {op: op for op in OPS}
for _backend, _kernels in KERNELS.items():
    add_kernels(_backend, _kernels, FUNCTIONS)
add_kernels(
    "triton", lazily("mpoe_kernels.routing.triton_gates", *GATING), {name: name for name in GATING}
)


@dataclass(frozen=True)
class Routing:
    """Which token sits in which slot.

    Sizes and dtypes are checked here. Values are checked only on the CPU, where a routing is used:
    on a GPU that would wait for the device, so a routing that `route` did not make gives undefined
    results if its indices are out of range.

    Attributes:
        expert_offsets: int32 ``[E + 1]``; expert e owns slots ``expert_offsets[e] :
            expert_offsets[e + 1]``.
        token_of_slot: int64 ``[N]`` with N = T * K; slots from ``expert_offsets[-1]`` on are empty
            (dropped or masked pairs are sorted there).
        slot_of_token: int64 ``[T, K]``; -1 = dropped or masked.
        is_routed: whether `route` made it, so that with K = 1 ``token_of_slot`` names every token
            once. Only then may a product scatter its rows to their tokens; otherwise some rows
            might stay unwritten.

    Raises:
        TypeError, ValueError: tensors of other dtypes, numbers of axes, sizes, or on several
            devices.
    """

    expert_offsets: Tensor
    token_of_slot: Tensor
    slot_of_token: Tensor
    by_route: InitVar[bool] = False  # which `dataclasses.replace` does not copy
    is_routed: bool = field(init=False)

    def __post_init__(self, by_route: bool) -> None:
        object.__setattr__(self, "is_routed", by_route)
        if by_route:
            return
        refuse_jit_trace("Routing")
        offsets = check_index("expert_offsets", self.expert_offsets, ("E + 1",))
        slots = check_index("token_of_slot", self.token_of_slot, ("N",))
        pairs = check_index("slot_of_token", self.slot_of_token, ("T", "K"))
        if offsets.shape[0] < 2:
            raise ValueError(f"expert_offsets must be [E + 1] with E >= 1; got {describe(offsets)}")
        tokens, top_k = pairs.shape
        if slots.shape[0] != tokens * top_k or top_k < 1:
            raise ValueError(
                f"token_of_slot [N] and slot_of_token [T, K] must have N = T * K and K >= 1; "
                f"got {describe(slots)} and {describe(pairs)}"
            )
        check_device("slot_of_token", pairs, expert_offsets=offsets, token_of_slot=slots)

    @property
    def num_experts(self) -> int:
        return self.expert_offsets.shape[0] - 1

    @property
    def expert_load(self) -> Tensor:
        """Slots of every expert, int32 ``[E]``."""
        return self.expert_offsets.diff()


# ------------------------------------------------------------------ route


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


def _route_fake(call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
    index = call.top_k_index
    return (
        index.new_empty(call.num_experts + 1, dtype=torch.int32),
        index.new_empty(index.shape[0] * index.shape[1]),
        index.new_empty(index.shape),
    )


_route = define_op("route", RouteCall, 3, _route_fake)


def route(
    top_k_index: Tensor,
    num_experts: int,
    capacity: int | None = None,
    token_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Routing:
    """Stable counting sort of (token, choice) pairs by expert.

    Args:
        top_k_index: ``[T, K]`` int64 (int32 is converted), entries in ``0..E-1``. Checked on the
            CPU, but not on a GPU, because that would wait for the device.
        num_experts: E, at most 2^20.
        capacity: maximum number of slots per expert; first choices are served before second ones,
            earlier tokens before later ones. ``None``: dropless.
        token_mask: bool ``[T]``; ``False`` tokens (padding) are neither routed nor counted.

    Returns:
        `Routing`.

    Raises:
        TypeError, ValueError: wrong shapes, dtypes or devices, no choices, 2^31 pairs or more,
            ``num_experts`` or ``capacity`` below 1 or not an integer, an entry outside ``0..E-1``
            (CPU).
    """
    if capacity is not None:
        capacity = min(check_integer("capacity", capacity, 1), MOST_PAIRS)
    offsets, token_of_slot, slot_of_token = _route(
        as_index("top_k_index", top_k_index),
        num_experts,
        capacity,
        token_mask,
        requested_backend(backend),
    )
    return Routing(offsets, token_of_slot, slot_of_token, by_route=True)


# --------------------------------------------------------------- dispatch


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
    """Its kernel returns the gradient ``[T, I]`` of x, every row a sum over its slots in a fixed
    order.

    Attributes:
        grad: ``[N, I]``.
        slot_of_token: int64 ``[T, K]``; -1: no slot.
        backend: as in `RouteCall`.
    """

    grad: Tensor
    slot_of_token: Tensor
    backend: str


def _dispatch_fake(call: DispatchCall) -> Tensor:
    return call.x.new_empty(call.token_of_slot.shape[0], call.x.shape[1])


def _dispatch_backward_fake(call: DispatchBackwardCall) -> Tensor:
    return call.grad.new_empty(call.slot_of_token.shape[0], call.grad.shape[1])


def _dispatch_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx = _dispatch_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.settings)
    return dx, None, None, None, None


_dispatch_backward = define_op(
    "dispatch_backward", DispatchBackwardCall, 1, _dispatch_backward_fake
)
_dispatch = define_op(
    "dispatch",
    DispatchCall,
    1,
    _dispatch_fake,
    backward=_dispatch_autograd,
    saves=("slot_of_token", "backend"),
)


def check_routing(routing: Routing) -> None:
    if not isinstance(routing, Routing):
        raise TypeError(f"routing must be a Routing (see route); got {type(routing).__name__}")


def check_gates(top_k_weights: Tensor, routing: Routing) -> None:
    """Refuse gates that are not floating ``[T, K]``."""
    check_tensor("top_k_weights", top_k_weights, ("T", "K"))
    check_floating("top_k_weights", top_k_weights)
    if top_k_weights.shape != routing.slot_of_token.shape:
        raise ValueError(
            f"top_k_weights must be [T, K] = {list(routing.slot_of_token.shape)}; got "
            f"{describe(top_k_weights)}"
        )


def dispatch(x: Tensor, routing: Routing, *, backend: str | None = None) -> Tensor:
    """Copy rows into slot order: ``x_sorted[s] = x[token_of_slot[s]]``, zero in empty slots.
    Differentiable in x.

    Args:
        x: ``[T, I]``, floating.
        routing: from `route`.

    Returns:
        ``[N, I]``.
    """
    check_routing(routing)
    return _dispatch(
        x,
        routing.expert_offsets,
        routing.token_of_slot,
        routing.slot_of_token,
        requested_backend(backend),
    )


# ---------------------------------------------------------------- combine


@dataclass
class CombineCall:
    """Its kernel returns ``[T, F]``, the gated sum of a token's rows; pairs without a slot
    contribute nothing.

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
    """Its kernel returns the gradients of ``y_sorted`` and ``top_k_weights``; what is not needed is
    empty.

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


def _combine_fake(call: CombineCall) -> Tensor:
    return call.y_sorted.new_empty(call.slot_of_token.shape[0], call.y_sorted.shape[1])


def _combine_backward_fake(call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
    dy = call.grad.new_empty(0)
    dweights = call.grad.new_empty(0)
    if call.need_y:
        dy = torch.empty_like(call.y_sorted)
    if call.need_weights:
        dweights = torch.empty_like(call.top_k_weights)
    return dy, dweights


def _combine_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_y = ctx.needs_input_grad[0]
    need_weights = ctx.needs_input_grad[4]
    dy, dweights = _combine_backward(
        grad.contiguous(), *ctx.saved_tensors, need_y, need_weights, *ctx.settings
    )
    if not need_y:
        dy = None
    if not need_weights:
        dweights = None
    return dy, None, None, None, dweights, None


_combine_backward = define_op("combine_backward", CombineBackwardCall, 2, _combine_backward_fake)
_combine = define_op(
    "combine",
    CombineCall,
    1,
    _combine_fake,
    backward=_combine_autograd,
    saves=("y_sorted", "token_of_slot", "slot_of_token", "top_k_weights", "backend"),
)


def combine(
    y_sorted: Tensor, routing: Routing, top_k_weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """Gate and un-sort: ``y[t] = sum_k top_k_weights[t, k] * y_sorted[slot_of_token[t, k]]`` over
    kept pairs.

    Args:
        y_sorted: ``[N, F]``, floating.
        routing: from `route`.
        top_k_weights: the gates, floating ``[T, K]``, of any floating dtype (usually float32).

    Returns:
        ``[T, F]`` in the dtype of ``y_sorted``; tokens without a kept pair are zero. Differentiable
        in both.
    """
    check_routing(routing)
    return _combine(
        y_sorted,
        routing.expert_offsets,
        routing.token_of_slot,
        routing.slot_of_token,
        top_k_weights,
        requested_backend(backend),
    )
