"""The compiled CPU kernels of csrc/cpu/experts/experts.h, of both forms: float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpoe_kernels.backends import Request
from mpoe_kernels.native_library import NATIVE_LIBRARY, address, dense, name_of
from mpoe_kernels.routing.gating import Gating, new_gating

if TYPE_CHECKING:
    from mpoe_kernels.experts.op import BackwardCall, ForwardCall

_DTYPES = (torch.float32, torch.bfloat16)


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a request (empty: they can)."""
    if request.dtype in _DTYPES:
        return []
    return [f"it computes {request.op} in float32 and bfloat16, not in {request.dtype}"]


def _operands(call: ForwardCall) -> list[Any]:
    """Dense tensors in the order of `HiddenCall.OPERANDS`, None where there is none; the caller
    keeps them until the library returns."""
    operands: list[Any] = []
    for name in call.OPERANDS:
        value = getattr(call, name or "", None)
        operands.append(None if value is None else dense(str(name), value))
    operands[1] = operands[1].float()
    operands[2] = operands[2].long()
    return operands


def _arguments(call: ForwardCall, operands: Sequence[Any]) -> tuple[Any, ...]:
    """Of forward and backward."""
    tokens, top_k = call.top_k_index.shape
    return (
        name_of(operands[0].dtype),
        call.activation,
        (tokens, call.num_experts, top_k),
        call.sizes,
        [address(operand) for operand in operands],
    )


def forward(call: ForwardCall) -> Tensor:
    """See `hidden_experts` and `neuron_experts`."""
    operands = _operands(call)
    rows: Tensor = operands[0]
    out = rows.new_empty(rows.shape[0], call.out_features)
    compute = getattr(NATIVE_LIBRARY.functions, call.OP)
    compute(*_arguments(call, operands), out.data_ptr())
    return out


def backward(call: BackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall` and `NeuronBackwardCall`."""
    operands = _operands(call)
    rows = operands[0]
    grad = dense("grad", call.grad)
    results: list[Tensor] = []
    for name, operand in zip(call.OPERANDS, operands, strict=True):
        if name in call.DIFFERENTIABLE:
            wanted = operand is not None and call.need[len(results)]
            result = torch.empty_like(operand) if wanted else rows.new_empty(0)
            results.append(result)
    addresses: list[int | None] = [result.data_ptr() for result in results]
    if len(addresses) == 6:  # neurons have no x_gate
        addresses.insert(5, None)
    compute = getattr(NATIVE_LIBRARY.functions, call.OP)
    compute(*_arguments(call, operands), grad.data_ptr(), addresses)
    results[1] = results[1].to(call.gates.dtype)
    return tuple(results)


def routed_hidden(
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
    """The router's decision, and `hidden_experts` of the chosen experts, in one call.

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
    # None where it is parametrized.
    right = blocks.get("right")
    left = blocks.get("left")
    right_gate = blocks.get("right_gate")
    if right is None or left is None or (u_gate is None) != (right_gate is None):
        return None
    if right.dim() != 4 or right.shape[2] != right.shape[3]:
        return None
    experts, groups, block, _ = right.shape
    tokens = x.shape[0]
    features = u.shape[-1]
    if tokens == 0 or u.numel() != tokens * features:
        return None
    if features % block or groups not in (1, features // block):
        return None
    if router_weight.shape != (experts, x.shape[1]):
        return None
    shapes = (
        (u, u.shape),
        (u_gate, u.shape),
        (right, right.shape),
        (left, right.shape),
        (right_gate, right.shape),
        (bias, (experts, features)),
    )
    if u.dtype not in _DTYPES or not _fit(shapes, u.dtype):
        return None
    gating = new_gating(x, experts, top_k)
    out = u
    if not overwrites:
        out = torch.empty_like(u)
    operands = (
        u,
        gating.top_k_weights,
        gating.top_k_index,
        right,
        left,
        bias,
        u_gate,
        right_gate,
    )
    x = dense("x", x)
    router_weight = dense("weight", router_weight)
    NATIVE_LIBRARY.functions.routed_hidden_experts(
        name_of(u.dtype),
        activation,
        (tokens, experts, top_k),
        (features, block, groups),
        [address(operand) for operand in operands],
        name_of(x.dtype),
        name_of(router_weight.dtype),
        x.shape[1],
        raw,
        1.0,
        (x.data_ptr(), router_weight.data_ptr(), None, gating.logits.data_ptr()),
        out.data_ptr(),
    )
    return out, gating


def routed_neurons(
    x: Tensor,
    router_weight: Tensor,
    top_k: int,
    raw: bool,
    scale: float,
    token_mask: Tensor | None,
    rows: Tensor,
    neurons: Mapping[str, Tensor | None],
    activation: str,
) -> Tensor | None:
    """The router's decision, and `neuron_experts` of the chosen experts, in one call; errors as in
    `routed_hidden`.

    Args:
        x, router_weight, top_k, raw: as in `routed_hidden`.
        scale: of the gates.
        token_mask: bool ``[T]``: the tokens that have experts; None: all.
        rows: what the experts read, ``[T, I]``.
        neurons: ``up``, ``down`` and, if they are given, ``bias`` and ``gate_proj`` (its
            ``gate_up``).
        activation: as in `NeuronCall`.

    Returns:
        ``o [T, O]``; None if the op must be called instead.
    """
    up = neurons.get("up")
    down = neurons.get("down")
    gate_up = neurons.get("gate_proj")
    bias = neurons.get("bias")
    if up is None or down is None:
        return None
    if rows.dim() != 2 or up.dim() != 3 or down.dim() != 3:
        return None
    experts, size, width = up.shape
    out_features = down.shape[2]
    tokens = x.shape[0]
    shapes = (
        (rows, (tokens, width)),
        (up, up.shape),
        (down, (experts, size, out_features)),
        (bias, (experts, size)),
        (gate_up, up.shape),
    )
    if router_weight.shape != (experts, x.shape[1]) or not _fit(shapes, rows.dtype):
        return None
    x = dense("x", x)
    router_weight = dense("weight", router_weight)
    mask = None
    if token_mask is not None:
        mask = dense("token_mask", token_mask)
    operands = (rows, None, None, up, down, bias, None, gate_up)
    out = rows.new_empty(tokens, out_features)
    NATIVE_LIBRARY.functions.routed_neuron_experts(
        name_of(rows.dtype),
        activation,
        (tokens, experts, top_k),
        (width, out_features, size),
        [address(operand) for operand in operands],
        name_of(x.dtype),
        name_of(router_weight.dtype),
        x.shape[1],
        raw,
        scale,
        (x.data_ptr(), router_weight.data_ptr(), address(mask), None),
        out.data_ptr(),
    )
    return out


def _fit(shapes: Sequence[tuple[Tensor | None, Sequence[int]]], dtype: torch.dtype) -> bool:
    """Whether the tensors that are given can be read in place as having these shapes."""
    for tensor, shape in shapes:
        if tensor is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            return False
        if not tensor.is_contiguous() or not tensor.is_cpu:
            return False
    return True
