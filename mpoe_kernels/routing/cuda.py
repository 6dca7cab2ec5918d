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
        mask = None if call.token_mask is None else call.token_mask.contiguous()
        return self.ops.route(_index(call.top_k_index), call.num_experts, call.capacity, mask)

    def dispatch(self, call: DispatchCall) -> Tensor:
        """A slot's only row is its token's; slots past the last offset are zero."""
        x = (
            call.x if call.x.stride(1) == 1 else call.x.contiguous()
        )  # rows may have gaps, or even overlap
        return self.ops.combine(
            x, _index(call.token_of_slot)[:, None], None, call.expert_offsets[-1:].int()
        )

    def dispatch_backward(self, call: DispatchBackwardCall) -> Tensor:
        """Summed in float32."""
        return self.ops.combine(call.grad.contiguous(), _index(call.slot_of_token), None, None)

    def combine(self, call: CombineCall) -> Tensor:
        """The gates keep their float32, the sum is rounded once."""
        gates = call.top_k_weights.float().contiguous()
        return self.ops.combine(call.y_sorted.contiguous(), _index(call.slot_of_token), gates, None)

    def combine_backward(self, call: CombineBackwardCall) -> tuple[Tensor, Tensor]:
        """Gradients of rows and gates, each by a launch."""
        where = map(_index, (call.token_of_slot, call.slot_of_token))
        gates = call.top_k_weights
        given = (
            call.grad.contiguous(),
            call.y_sorted.contiguous(),
            *where,
            gates.float().contiguous(),
        )
        dy, dweights = self.ops.combine_backward(*given, call.need_y, call.need_weights)
        return (
            dy if call.need_y else call.grad.new_empty(0),
            dweights.to(gates.dtype) if call.need_weights else call.grad.new_empty(0),
        )
