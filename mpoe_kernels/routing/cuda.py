"""Routing by the kernels of csrc/cuda/routing/routing.h. Calls and results: see `op`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpoe_kernels.routing.gating import Gating

if TYPE_CHECKING:
    from mpoe_kernels.routing.op import CombineBackwardCall, CombineCall, DispatchBackwardCall, DispatchCall, RouteCall


@dataclass(frozen=True)
class RoutingKernels:
    """The kernels of `mpoe_kernels.routing.op`.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def gate(self, logits: Tensor, top_k: int, raw: bool) -> Gating:
        """One launch. ``raw``: gates are probabilities, otherwise they sum to 1."""
        weights, index = self.ops.gate(logits, top_k, not raw)
        return Gating(logits, index, weights)

    def route(self, call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
        """One launch for up to 1024 pairs. Entries outside ``0..E-1`` count as masked, as checking them would wait."""
        return self.ops.route(call.top_k_index, call.num_experts, call.capacity, call.token_mask)

    def dispatch(self, call: DispatchCall) -> Tensor:
        """Slots past the last offset are zero."""
        return self.ops.dispatch(call.x, call.expert_offsets, call.token_of_slot)

    def dispatch_backward(self, call: DispatchBackwardCall) -> Tensor:
        """Summed in float32."""
        return self.ops.combine(call.grad, call.slot_of_token, None)

    def combine(self, call: CombineCall) -> Tensor:
        """The gates keep their float32, the sum is rounded once."""
        return self.ops.combine(call.y_sorted, call.slot_of_token, call.top_k_weights)

    def combine_backward(self, call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
        """Gradients of rows and gates, each by a launch."""
        where, need = (call.token_of_slot, call.slot_of_token), (call.need_y, call.need_weights)
        dy, dweights = self.ops.combine_backward(call.grad, call.y_sorted, *where, call.top_k_weights, *need)
        return (
            dy if call.need_y else call.grad.new_empty(0),
            dweights if call.need_weights else call.grad.new_empty(0),
        )
