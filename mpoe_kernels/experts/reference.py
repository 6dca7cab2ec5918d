"""`hidden_experts` and `neuron_experts` as their definitions: loops over tokens, choices, groups.
Only tests and bench import them."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.linear.reference import activation_reference


def hidden_experts_reference(
    u: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    u_gate: Tensor | None = None,
    right_gate: Tensor | None = None,
) -> Tensor:
    """See `mpoe_kernels.hidden_experts`; blocks are ``[E, G', b, b]``."""
    size = right.shape[-1]
    own_groups = right.shape[1]
    # Views of all blocks are taken at once: the gradient of each taken alone would be as large as
    # the whole.
    blocks = [
        None if x is None else [part.unbind() for part in x.unbind()]
        for x in (right, left, right_gate)
    ]
    rights, lefts, right_gates = blocks
    assert rights is not None
    assert lefts is not None
    rows = []
    for t, choices in enumerate(top_k_index.tolist()):
        row = torch.zeros_like(u[t])
        for k, e in enumerate(choices):
            if e < 0:
                continue
            parts = []
            for g in range(u.shape[1] // size):
                units = slice(g * size, (g + 1) * size)
                part = g if own_groups > 1 else 0
                value = u[t, units] @ rights[e][part]
                z = (
                    value
                    if u_gate is None or right_gates is None
                    else u_gate[t, units] @ right_gates[e][part]
                )
                h = activation_reference(activation, z if bias is None else z + bias[e, units])
                h = h if u_gate is None else h * value
                parts.append(h @ lefts[e][part])
            row = row + gates[t, k].to(u.dtype) * torch.cat(parts)
        rows.append(row)
    return torch.stack(rows) if rows else torch.zeros_like(u)


def neuron_experts_reference(
    x: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gate_up: Tensor | None = None,
) -> Tensor:
    """See `mpoe_kernels.neuron_experts`."""
    # Views of all experts are taken at once: the gradient of each taken alone would be as large as
    # the whole.
    ups = up.unbind()
    downs = down.unbind()
    gate_ups = ups if gate_up is None else gate_up.unbind()
    rows = []
    for t, choices in enumerate(top_k_index.tolist()):
        row = x.new_zeros(down.shape[2])
        for k, e in enumerate(choices):
            if e < 0:
                continue
            z = gate_ups[e] @ x[t]
            h = activation_reference(activation, z if bias is None else z + bias[e])
            if gate_up is not None:
                h = h * (ups[e] @ x[t])
            row = row + gates[t, k].to(x.dtype) * (h @ downs[e])
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, down.shape[2])
