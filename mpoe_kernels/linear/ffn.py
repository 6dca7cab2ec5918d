"""`mpo_ffn`: a whole mixture-of-experts feed-forward network over routed tokens, composed of the
other ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import places_rows
from mpoe_kernels.checks import describe
from mpoe_kernels.define import requested_backend
from mpoe_kernels.linear.op import forward_op, grouped_mpo_linear
from mpoe_kernels.mpo.fold import MPOBlocks, check_blocks
from mpoe_kernels.routing.op import Routing, check_gates, check_routing, combine


def mpo_ffn(
    x: Tensor,
    routing: Routing,
    top_k_weights: Tensor,
    up: MPOBlocks,
    down: MPOBlocks,
    *,
    gate_proj: MPOBlocks | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``y[t] = sum_k gate[t, k] * FFN_e(x[t])`` with ``FFN_e(x) = down_e(activation(up_e x))``.

    With ``gate_proj``: ``down_e(activation(gate_e x) * up_e x)``.

    Args:
        x: ``[T, I]``, floating.
        routing: from `route`; the rows are gathered by the first product.
        top_k_weights: gates ``[T, K]``.
        up, gate_proj: blocks I -> hidden.
        down: blocks hidden -> I.
        up_bias, down_bias: ``[hidden]`` and ``[I]``, shared by the experts.
        activation: see `grouped_mpo_linear`.
        dropout: probability of dropping a hidden activation (training only).
        backend: as in `grouped_mpo_linear`.

    Returns:
        ``[T, I]``; a dropped token's row is zero.

    Raises:
        TypeError, ValueError: a dropout outside 0..1; see `grouped_mpo_linear`, `combine`.
    """
    check_routing(routing)
    check_blocks("up", up)
    check_blocks("down", down)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float):
        raise TypeError(f"dropout must be a number; got {describe(dropout)}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must lie between 0 and 1; got {dropout}")
    offsets = routing.expert_offsets
    rows: dict[str, Any] = {
        "row_index": routing.token_of_slot,
        "slot_of_token": routing.slot_of_token,
    }
    if gate_proj is None:
        hidden = grouped_mpo_linear(
            x, up, offsets, up_bias, **rows, activation=activation, backend=backend
        )
    else:
        check_blocks("gate_proj", gate_proj)
        if up.out_features != gate_proj.out_features:
            raise ValueError(
                f"gate_proj must have {up.out_features} out_features like up; got "
                f"{gate_proj.out_features}"
            )
        hidden = grouped_mpo_linear(
            x, gate_proj, offsets, **rows, activation=activation, backend=backend
        )
        hidden = hidden * grouped_mpo_linear(x, up, offsets, up_bias, **rows, backend=backend)
    if dropout > 0.0:
        hidden = torch.nn.functional.dropout(hidden, dropout)
    if _may_place(hidden, down, down_bias, routing, top_k_weights, backend):
        return placed_mpo_linear(hidden, down, offsets, down_bias, routing, top_k_weights, backend)
    y = grouped_mpo_linear(hidden, down, offsets, down_bias, backend=backend)
    return combine(y, routing, top_k_weights, backend=backend)


def placed_mpo_linear(
    x: Tensor,
    blocks: MPOBlocks,
    expert_offsets: Tensor,
    bias: Tensor | None,
    routing: Routing,
    top_k_weights: Tensor,
    backend: str | None,
    strategy: str = "auto",
) -> Tensor:
    """``combine(grouped_mpo_linear(x, ...), routing, top_k_weights)`` for one expert per token,
    with one launch less on a GPU.

    The result is bit-identical. There is no gradient: x and the gates must not require one.

    Args:
        x: ``[N, I]`` in slot order.
        blocks, expert_offsets, bias, backend, strategy: as in `grouped_mpo_linear`.
        routing: from `route`: its ``token_of_slot`` names every token once.
        top_k_weights: ``[T, 1]``.

    Returns:
        ``[T, F]``.
    """
    check_blocks("blocks", blocks)
    check_gates(top_k_weights, routing)
    y, _, _ = forward_op(
        x,
        blocks.left,
        blocks.central,
        blocks.right,
        expert_offsets,
        bias,
        None,
        blocks.in_features,
        blocks.out_features,
        "none",
        strategy,
        requested_backend(backend),
        False,
        routing.slot_of_token.long(),
        routing.token_of_slot.long(),
        top_k_weights.float().flatten(),
    )
    return y


def _may_place(
    hidden: Tensor,
    down: MPOBlocks,
    bias: Tensor | None,
    routing: Routing,
    gates: Tensor,
    backend: str | None,
) -> bool:
    """Whether the last product may scatter its rows to their tokens, times their gates.

    This requires one slot per token (from `route`), no gradients (a gate's gradient needs the
    unscaled rows), and kernels that may run on a GPU.
    """
    if not routing.is_routed or routing.slot_of_token.shape[1] != 1:
        return False
    if hidden.device.type == "cpu" and not places_rows(requested_backend(backend)):
        return False
    tensors = (hidden, down.left, down.central, down.right, bias, gates)
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
