"""The compiled CPU kernels of csrc/cpu/hidden_experts/hidden_experts.h: float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpoe_kernels.backends import Request
from mpoe_kernels.native_library import NATIVE_LIBRARY, address, dense, dense_index, name_of
from mpoe_kernels.routing.gating import Gating, new_gating

if TYPE_CHECKING:
    from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall

_DTYPES = (torch.float32, torch.bfloat16)


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a request (empty: they can)."""
    if request.dtype in _DTYPES:
        return []
    return [f"it computes hidden_experts in float32 and bfloat16, not in {request.dtype}"]


def _inputs(call: HiddenCall) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """Arguments of both passes, and the tensors that they point to, which the caller must keep
    until the call returns."""
    (tokens, features), (experts, groups, block, _) = call.u.shape, call.right.shape
    index = dense_index("top_k_index", call.top_k_index)
    given = {
        name: getattr(call, name) for name in ("u_gate", "right", "left", "right_gate", "bias")
    }
    u_gate, right, left, right_gate, bias = (
        v if v is None else dense(name, v) for name, v in given.items()
    )
    kept = (
        dense("u", call.u),
        u_gate,
        dense("gates", call.gates).float(),
        index,
        right,
        left,
        right_gate,
        bias,
    )
    sizes = (tokens, features, block, experts, groups, index.shape[1])
    return (name_of(call.u.dtype), call.activation, sizes, [address(each) for each in kept]), kept


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    arguments, (u, *_kept) = _inputs(call)
    assert u is not None
    out = torch.empty_like(u)
    NATIVE_LIBRARY.functions.hidden_experts(*arguments, out.data_ptr())
    return out


def routed(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    raw: bool,
    u: Tensor,
    blocks: Mapping[str, Tensor | None],
    bias: Tensor | None,
    u_gate: Tensor | None,
    activation: str,
    overwrites: bool,
) -> tuple[Tensor, Gating] | None:
    """The router's decision, and `forward` of the chosen experts, in one call.

    While decoding, checking every argument takes longer than computing: invalid arguments are left
    to the op, which raises the error.

    Args:
        x: the router's tokens ``[T, I]``, where `routing.gating.can_route_natively` holds, for all
            tensors given here.
        router_weight: ``[E, I]``.
        top_k: K.
        raw: as in `native_gating`.
        u: ``[..., F]``, T rows, as dense as the rest.
        blocks: ``right``, ``left`` and, if gated, ``right_gate``: ``[E, G', b, b]``.
        bias: ``[E, F]`` or None.
        u_gate: as ``u``, or None.
        activation: as in `HiddenCall`.
        overwrites: nobody needs ``u`` any more: the result may take its place.

    Returns:
        ``o [..., F]`` and the decision; None if the op must be called instead.
    """
    right, left, right_gate = map(
        blocks.get, ("right", "left", "right_gate")
    )  # none where it is parametrized
    if right is None or left is None or (u_gate is None) != (right_gate is None):
        return None
    if right.dim() != 4 or right.shape[2] != right.shape[3]:
        return None
    (experts, groups, block, _), features, tokens = right.shape, u.shape[-1], x.shape[0]
    if not (
        tokens > 0
        and u.numel() == tokens * features
        and u.dtype in _DTYPES
        and features % block == 0
        and groups in (1, features // block)
        and router_weight.shape[0] == experts
    ):
        return None
    x, router_weight = dense("x", x), dense("weight", router_weight)
    given = (
        *(
            (u, u.shape),
            (u_gate, u.shape),
            (right, right.shape),
            (left, right.shape),
            (right_gate, right.shape),
        ),
        (bias, (experts, features)),
    )
    for each, shape in given:
        if each is not None and not (
            each.dtype == u.dtype and each.shape == shape and each.is_contiguous() and each.is_cpu
        ):
            return None
    found, out = new_gating(x, experts, top_k), u if overwrites else torch.empty_like(u)
    inputs = (u, u_gate, found.top_k_weights, found.top_k_index, right, left, right_gate, bias)
    NATIVE_LIBRARY.functions.routed_hidden_experts(
        *(name_of(x.dtype), name_of(router_weight.dtype), x.shape[1], raw),
        *(
            x.data_ptr(),
            router_weight.data_ptr(),
            found.logits.data_ptr(),
            name_of(u.dtype),
            activation,
        ),
        *(
            (tokens, features, block, experts, groups, top_k),
            [address(each) for each in inputs],
            out.data_ptr(),
        ),
    )
    return out, found


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    arguments, kept = _inputs(call)
    u, own_gate, own_gates, _, right, left, right_gate, bias = kept
    assert u is not None
    rows = dense("grad", call.grad)
    likes = (u, own_gates, right, left, bias, own_gate, right_gate)
    results = [
        u.new_empty(0) if like is None or not wanted else torch.empty_like(like)
        for like, wanted in zip(likes, call.need, strict=True)
    ]
    NATIVE_LIBRARY.functions.hidden_experts_backward(
        *arguments, rows.data_ptr(), [result.data_ptr() for result in results]
    )
    results[1] = results[1].to(call.gates.dtype)
    return tuple(results)
