"""Grouped MPO products written as their definition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.routing.reference import combine_reference


def weight_reference(blocks: MPOBlocks, expert: int) -> Tensor:
    """``W_e[iL iC iR, jL jC jR] = sum_ab left_e central right_e``, cropped to ``[I, F]``."""
    full = torch.einsum(
        "xya,aijb,bpq->xipyjq", blocks.left[expert], blocks.central, blocks.right[expert]
    )
    rows = full.shape[0] * full.shape[1] * full.shape[2]
    return full.reshape(rows, -1)[: blocks.in_features, : blocks.out_features]


def activation_reference(name: str | None, z: Tensor) -> Tensor:
    """Activations by their formulas."""
    if name in (None, "none"):
        return z
    if name == "relu":
        return torch.where(z > 0, z, torch.zeros_like(z))
    if name == "gelu":
        return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
    if name in ("gelu_tanh", "gelu_new", "gelu_pytorch_tanh"):
        inner = math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)
        return 0.5 * z * (1 + torch.tanh(inner))
    if name == "silu":
        return z * torch.sigmoid(z)
    raise ValueError(f"no reference for activation {name!r}")


def grouped_mpo_linear_reference(
    x: Tensor,
    blocks: MPOBlocks,
    expert_offsets: Tensor,
    bias: Tensor | None = None,
    *,
    row_index: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """``y[s] = activation(x[row_index[s]] @ W_e + bias)`` for the slots of expert e; zero past the
    last."""
    offsets = expert_offsets.tolist()
    rows = x
    if row_index is not None:
        rows = x[row_index.long()]
    out = []
    for e, (start, stop) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if stop > start:
            z = rows[start:stop] @ weight_reference(blocks, e)
            if bias is not None:
                z = z + bias
            out.append(activation_reference(activation, z))
    out.append(rows.new_zeros(rows.shape[0] - offsets[-1], blocks.out_features))
    return torch.cat(out)


def mpo_embedding_reference(ids: Tensor, blocks: MPOBlocks) -> Tensor:
    """Rows of the rebuilt table."""
    return weight_reference(blocks, 0)[ids.long()]


def mpo_ffn_reference(
    x: Tensor,
    routing,
    top_k_weights: Tensor,
    up: MPOBlocks,
    down: MPOBlocks,
    *,
    gate_proj: MPOBlocks | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """``combine(down(activation(up x)))``, or with a gate ``down(activation(gate x) * up x)``."""
    offsets = routing.expert_offsets
    rows = x[routing.token_of_slot.long()]
    hidden = grouped_mpo_linear_reference(rows, up, offsets, up_bias)
    if gate_proj is None:
        hidden = activation_reference(activation, hidden)
    else:
        gate = grouped_mpo_linear_reference(rows, gate_proj, offsets, activation=activation)
        hidden = gate * hidden
    y = grouped_mpo_linear_reference(hidden, down, offsets, down_bias)
    return combine_reference(y, routing, top_k_weights)
