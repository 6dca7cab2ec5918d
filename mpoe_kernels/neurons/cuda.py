"""The kernels of csrc/cuda/experts, as one group of hidden units: both products and the activation in one launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpoe_kernels.backends import Request
from mpoe_kernels.hidden_experts.cuda import MOST_UNITS, dense, unsorted

if TYPE_CHECKING:
    from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall


def _arguments(call: NeuronCall) -> tuple[Any, ...]:
    up, down, gate_up = (None if each is None else each[:, None] for each in (call.up, call.down, call.gate_up))
    tensors = dense(call.x, call.gates, call.top_k_index, up, down, call.bias, None, gate_up)
    return *tensors, True, call.activation


@dataclass(frozen=True)
class NeuronKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def forward(self, call: NeuronCall) -> Tensor:
        """See `neuron_experts`. An index outside ``0..E-1`` means no expert."""
        return self.ops.experts(*_arguments(call))

    def backward(self, call: NeuronBackwardCall) -> tuple[Tensor, ...]:
        """See `NeuronBackwardCall`."""
        *need, need_gate_up = (int(wanted) for wanted in call.wanted)
        given = call.grad.contiguous(), *_arguments(call), [*need, 0, need_gate_up]
        dx, dgates, *found = self.ops.experts_backward(*given)
        grads = (dx, dgates.to(call.gates.dtype), *found[:3], found[4])
        # The kernels' weights have an axis of groups.
        return tuple(grad.squeeze(1) if grad.dim() == 4 else grad for grad in grads)

    @staticmethod
    def reasons(request: Request) -> list[str]:
        """Why the kernels cannot run a request (empty: they can)."""
        neurons = request.sizes.get("neurons", 0)
        if neurons <= MOST_UNITS:
            return unsorted(request)
        return [f"it computes neuron_experts with at most {MOST_UNITS} neurons of an expert, not with {neurons}"]
