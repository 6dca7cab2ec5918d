"""The kernels of csrc/cuda/experts: slots sorted by expert, then tiles of slots of one expert; float32, bfloat16,
float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mpoe_kernels.backends import Request

if TYPE_CHECKING:
    from mpoe_kernels.hidden_experts.op import HiddenBackwardCall, HiddenCall

MOST_UNITS = 512  # kMostUnits
MOST_BINS = 12_000  # kMostBins


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Inputs of an op as its kernels read them: the second ones, which are gates, in float32."""
    given = (each.float() if number == 1 and each is not None else each for number, each in enumerate(tensors))
    return [each if each is None else each.contiguous() for each in given]


@dataclass(frozen=True)
class HiddenKernels:
    """The two kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
    """

    ops: Any

    def forward(self, call: HiddenCall) -> Tensor:
        """See `hidden_experts`. An index outside ``0..E-1`` means no expert."""
        return self.ops.experts(*dense(*call.tensors), False, call.kernel_activation)

    def backward(self, call: HiddenBackwardCall) -> tuple[Tensor, ...]:
        """See `HiddenBackwardCall`."""
        need = [int(wanted) for wanted in call.need]
        given = call.grad.contiguous(), *dense(*call.tensors), False, call.kernel_activation
        du, dgates, *others = self.ops.experts_backward(*given, need)
        return du, dgates.to(call.gates.dtype), *others

    @staticmethod
    def reasons(request: Request) -> list[str]:
        """Why the kernels cannot run a request (empty: they can)."""
        block = request.sizes.get("block", 0)
        if block <= MOST_UNITS:
            return unsorted(request)
        return [f"it computes hidden_experts with blocks of at most {MOST_UNITS} hidden units, not of {block}"]


def unsorted(request: Request) -> list[str]:
    """Why the choices cannot be sorted, whose counts must fit into shared memory (empty: they can)."""
    experts, choices = (request.sizes.get(name, 0) for name in ("experts", "choices"))
    if (experts + 1) * choices <= MOST_BINS:
        return []
    return [f"it sorts at most {MOST_BINS:,} choices x (experts + 1), not {choices} x {experts + 1:,}"]
