"""The compiled CPU kernels of csrc/cpu/hidden_experts.h: float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.registry import Request

OPS = torch.ops.mpoe_native


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a request (empty: they can)."""
    if request.dtype in (torch.float32, torch.bfloat16):
        return []
    return [f"it computes hidden_experts in float32 and bfloat16, not in {request.dtype}"]


def forward(
    u: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    u_gate: Tensor | None,
    right_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """See `hidden_experts`; blocks ``[E, G', b, b]``."""
    return OPS.hidden_experts(u, gates, top_k_index, right, left, bias, u_gate, right_gate, activation)


def backward(
    grad: Tensor,
    u: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None,
    u_gate: Tensor | None,
    right_gate: Tensor | None,
    activation: str,
    need: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `eager.backward`."""
    inputs = (u, gates, top_k_index, right, left, bias, u_gate, right_gate)
    bits = sum(1 << place for place, wanted in enumerate(need) if wanted)
    du, dgates, *rest = OPS.hidden_experts_backward(grad, *inputs, activation, bits)
    dgates = dgates.to(gates.dtype if need[1] else u.dtype)
    return du, dgates, *rest  # type: ignore[return-value]
