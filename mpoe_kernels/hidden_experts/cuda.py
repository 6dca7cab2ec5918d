"""The kernels of csrc/cuda/hidden.h: one launch forward, at most three backward; float32, bfloat16 and float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpoe_kernels.planner import may_round_to_tf32
from mpoe_kernels.registry import Request

LARGEST_BLOCK = 64  # kLargestHiddenBlock


def _named(activation: str) -> str:
    return "gelu_tanh" if activation == "gelu_new" else activation


@dataclass(frozen=True)
class HiddenKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def forward(
        self,
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
        """See `hidden_experts`; blocks ``[E, G', b, b]``. An index outside ``0..E-1`` is no expert."""
        inputs = (u, gates, top_k_index, right, left, bias, u_gate, right_gate)
        return self.ops.hidden_experts(*inputs, _named(activation), may_round_to_tf32(u.dtype))

    def backward(
        self,
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
        inputs = (grad, u, gates, top_k_index, right, left, bias, u_gate, right_gate)
        tf32 = may_round_to_tf32(u.dtype)
        return self.ops.hidden_experts_backward(*inputs, _named(activation), [int(wanted) for wanted in need], tf32)

    @staticmethod
    def reasons(request: Request) -> list[str]:
        """Why the kernels cannot run a request (empty: they can)."""
        block = request.sizes.get("block", 0)
        if block <= LARGEST_BLOCK:
            return []
        return [f"it computes hidden_experts with blocks of at most {LARGEST_BLOCK} hidden units, not of {block}"]
