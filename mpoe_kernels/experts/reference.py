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
    return _rows(u, gates, top_k_index, right, left, bias, activation, u_gate, right_gate)


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
    """See `mpoe_kernels.neuron_experts`: one group."""
    right = up.mT[:, None]
    x_gate = None
    right_gate = None
    if gate_up is not None:
        x_gate = x
        right_gate = gate_up.mT[:, None]
    left = down[:, None]
    return _rows(x, gates, top_k_index, right, left, bias, activation, x_gate, right_gate)


def _rows(
    x: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    activation: str,
    x_gate: Tensor | None,
    right_gate: Tensor | None,
) -> Tensor:
    """Of both forms: groups of ``x`` times blocks ``[E, G', p, q]`` and ``[E, G', q, r]``."""
    size = right.shape[2]
    units = right.shape[3]
    groups = x.shape[1] // size
    # Views of all blocks are taken at once: the gradient of each taken alone would be as large as
    # the whole.
    rights = [blocks.unbind() for blocks in right.unbind()]
    lefts = [blocks.unbind() for blocks in left.unbind()]
    right_gates = rights
    if right_gate is not None:
        right_gates = [blocks.unbind() for blocks in right_gate.unbind()]
    rows = []
    for t, choices in enumerate(top_k_index.tolist()):
        row = x.new_zeros(groups * left.shape[3])
        for k, e in enumerate(choices):
            if e < 0:
                continue
            parts = []
            for g in range(groups):
                inputs = slice(g * size, (g + 1) * size)
                block = 0
                if len(rights[e]) > 1:
                    block = g
                value = x[t, inputs] @ rights[e][block]
                z = value
                if x_gate is not None:
                    z = x_gate[t, inputs] @ right_gates[e][block]
                if bias is not None:
                    z = z + bias[e, g * units : (g + 1) * units]
                h = activation_reference(activation, z)
                if x_gate is not None:
                    h = h * value
                parts.append(h @ lefts[e][block])
            row = row + gates[t, k].to(x.dtype) * torch.cat(parts)
        rows.append(row)
    if rows:
        return torch.stack(rows)
    return x.new_zeros(0, groups * left.shape[3])
