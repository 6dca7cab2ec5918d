"""Routing by the kernels of csrc/cuda/routing.h; same arguments and results as the eager ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class RoutingKernels:
    """The kernels of `mpoe_kernels.routing.op`.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def route(
        self, top_k_index: Tensor, num_experts: int, capacity: int | None, token_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One launch for up to 1024 pairs. Entries outside ``0..E-1`` count as masked, as checking them would wait."""
        return self.ops.route(top_k_index, num_experts, capacity, token_mask)

    def dispatch(self, x: Tensor, expert_offsets: Tensor, token_of_slot: Tensor, slot_of_token: Tensor) -> Tensor:
        """``[T, I] -> [N, I]``; slots past the last offset are zero."""
        return self.ops.dispatch(x, expert_offsets, token_of_slot)

    def dispatch_backward(self, grad: Tensor, slot_of_token: Tensor) -> Tensor:
        """``[N, I] -> [T, I]``, summed in float32."""
        return self.ops.combine(grad, slot_of_token, None)

    def combine(
        self,
        y_sorted: Tensor,
        expert_offsets: Tensor,
        token_of_slot: Tensor,
        slot_of_token: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """``[N, F] -> [T, F]``, gated; the gates keep their float32, the sum is rounded once."""
        return self.ops.combine(y_sorted, slot_of_token, top_k_weights)

    def combine_backward(
        self,
        grad: Tensor,
        y_sorted: Tensor,
        token_of_slot: Tensor,
        slot_of_token: Tensor,
        top_k_weights: Tensor,
        need_y: bool,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``y_sorted`` and ``top_k_weights``; an empty tensor where none is needed."""
        dy, dweights = self.ops.combine_backward(
            grad, y_sorted, token_of_slot, slot_of_token, top_k_weights, need_y, need_weights
        )
        return dy if need_y else grad.new_empty(0), dweights if need_weights else grad.new_empty(0)

    def table(self) -> dict[str, Callable[..., Any]]:
        ops = ("route", "dispatch", "dispatch_backward", "combine", "combine_backward")
        return {name: getattr(self, name) for name in ops}
