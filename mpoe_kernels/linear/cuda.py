"""Grouped MPO linear by the kernels of csrc/cuda/linear: the strategy `rebuild` as a fused chain,
for any bonds.

Weights and their gradients never leave the chip. Forward: one launch gathers the rows, rebuilds the
weights, multiplies, and applies bias, activation and the scatter with gates. Backward: one launch
of the same kernel for x, one of the gradient kernel for left and central, one for right, with a
library product each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract import Contraction
from mpoe_kernels.linear.gradients import (
    Backward,
    Forward,
    Slots,
    fused_backward,
    fused_forward,
    prepared,
)
from mpoe_kernels.linear.grouped import ON_CHIP, counting_reasons

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

Call = TypeVar("Call", "ForwardCall", "BackwardCall")
BLOCKS_WANTED = 256  # of a launch whose sum can be divided, whatever the card
MOST_EXPERTS = 65_535  # of a gradient: the last axis of its grid, of which CUDA allows no more


def _prepared(call: Call) -> Call:
    """The kernels read dense tensors and count slots in 32 bits."""
    if call.expert_offsets.dtype != torch.int32:
        call = replace(call, expert_offsets=call.expert_offsets.to(torch.int32))
    return prepared(call, "x", "left", "central", "right")


def _by_bond(right: Tensor) -> Tensor:
    """``[E, b, iR, jR] -> [E, iR, jR, b]``: the kernels read runs of bonds."""
    return right.permute(0, 2, 3, 1).contiguous()


@dataclass(frozen=True)
class LinearKernels:
    """The kernels of the op.

    Attributes:
        ops: namespace of the compiled ops.
        name: of the backend.
    """

    ops: Any
    name: str = "cuda"

    def contraction_reasons(self, plan: Contraction) -> list[str]:
        """Why the kernels cannot compute a contraction (empty: they can)."""
        if plan.strategy != "rebuild":
            instead = "take backend='auto' or 'triton', or strategy='rebuild'"
            return [f"it computes the strategy 'rebuild' alone, not {plan.strategy!r}; {instead}"]
        reasons = counting_reasons(plan)
        if plan.phase == "backward" and plan.num_experts > MOST_EXPERTS:
            reasons.append(
                f"a backward of {plan.num_experts} experts is too large; at most {MOST_EXPERTS}"
            )
        return reasons

    def candidates(self, plan: Contraction) -> list[Candidate]:
        """The fused chain, for `rebuild`."""
        return [Candidate(self.name, ON_CHIP, plan.strategy, getattr(self, plan.phase))]

    def forward(self, call: ForwardCall) -> Forward:
        """``(y, h, z)``, see `ForwardCall`."""
        return fused_forward(_prepared(call), self._product)

    def backward(self, call: BackwardCall) -> Backward:
        """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
        return fused_backward(_prepared(call), self._product, self._weight_gradient_times)

    def _product(
        self,
        call: ForwardCall | BackwardCall,
        rows: Tensor,
        out: Tensor,
        pre: Tensor | None,
        transposed: bool,
    ) -> None:
        """See `mpoe_kernels.linear.gradients.Product`."""
        row_index, bias, activation, out_index, gates = call.around
        self.ops.rebuilt_product(
            rows,
            call.left,
            call.central,
            _by_bond(call.right),
            out,
            call.expert_offsets,
            row_index,
            bias,
            activation,
            pre,
            transposed,
            out_index,
            gates,
        )

    def _weight_gradient_times(
        self, call: BackwardCall, dz: Tensor, other: Tensor, of_right: bool, slots: Slots
    ) -> Tensor:
        """See `mpoe_kernels.linear.gradients.block_gradients`. One launch."""
        d = call.dims
        experts = other.shape[0]
        if of_right:
            parts = min(d.iC * d.jC, BLOCKS_WANTED // experts)
            parts = max(1, parts)
            other = other.contiguous()
            out = dz.new_empty(parts, experts, d.iR, d.jR, d.b, dtype=torch.float32)
        else:
            other = _by_bond(other)
            out = dz.new_empty(experts, d.iL, d.jL, d.iC, d.jC, d.b)
        offsets = slots.offsets.contiguous()
        self.ops.weight_gradient_product(call.x, dz, other, out, offsets, call.row_index, of_right)
        if of_right:
            return out.sum(0).permute(0, 3, 1, 2)
        return out
