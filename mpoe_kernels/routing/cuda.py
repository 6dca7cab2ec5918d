"""Routing by the kernels of csrc/cuda/routing/routing.h. Calls and results: see `op`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mpoe_kernels.routing.op import (
        CombineBackwardCall,
        CombineCall,
        DispatchBackwardCall,
        DispatchCall,
        RouteCall,
    )


def _index(numbers: Tensor) -> Tensor:
    return numbers.long().contiguous()


@dataclass(frozen=True)
class RoutingKernels:
    """The kernels of `mpoe_kernels.routing.op`.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def route(self, call: RouteCall) -> tuple[Tensor, Tensor, Tensor]:
        """One launch for up to 1024 pairs. Entries outside ``0..E-1`` count as masked, as checking
        them would wait."""
        mask = None
        if call.token_mask is not None:
            mask = call.token_mask.contiguous()
        return self.ops.route(_index(call.top_k_index), call.num_experts, call.capacity, mask)

    def dispatch(self, call: DispatchCall) -> Tensor:
        """A slot's only row is its token's; slots past the last offset are zero."""
        x = call.x  # rows may have gaps, or even overlap
        if x.stride(1) != 1:
            x = x.contiguous()
        index = _index(call.token_of_slot)[:, None]
        filled = call.expert_offsets[-1:].int()
        return self.ops.combine(x, index, None, filled)

    def dispatch_backward(self, call: DispatchBackwardCall) -> Tensor:
        """Summed in float32."""
        return self.ops.combine(call.grad.contiguous(), _index(call.slot_of_token), None, None)

    def combine(self, call: CombineCall) -> Tensor:
        """The gates keep their float32, the sum is rounded once."""
        gates = call.top_k_weights.float().contiguous()
        return self.ops.combine(call.y_sorted.contiguous(), _index(call.slot_of_token), gates, None)

    def combine_backward(self, call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
        """Gradients of rows and gates, each by a launch."""
        gates = call.top_k_weights
        dy, dweights = self.ops.combine_backward(
            call.grad.contiguous(),
            call.y_sorted.contiguous(),
            _index(call.token_of_slot),
            _index(call.slot_of_token),
            gates.float().contiguous(),
            call.need_y,
            call.need_weights,
        )
        if not call.need_y:
            dy = call.grad.new_empty(0)
        if not call.need_weights:
            return dy, call.grad.new_empty(0)
        return dy, dweights.to(gates.dtype)
