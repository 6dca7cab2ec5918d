"""One grouped MPO product, forward and backward, by the Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton.cost import ON_CHIP, ON_CHIP_FROM_HALF, WIDE
from mpoe_kernels.linear.triton.kernels import (
    backward_by_steps,
    backward_on_chip,
    forward_by_steps,
    forward_on_chip,
)
from mpoe_kernels.testing.assertions import poisoned_memory
from mpoe_kernels.testing.linear_problem import LinearProblem, planned_strategies

CHIP = (ON_CHIP, ON_CHIP_FROM_HALF)  # ways to run the strategy ``rebuild`` with the fused kernels


def strategies_of(shape: MPOShape) -> list[str]:
    """What the planner may choose, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


class Case(LinearProblem):
    """A strategy may be one of the on-chip ways."""

    def _common(self, strategy: str) -> tuple[Any, ...]:
        tensors = (self.x, *self.blocks, self.routing.expert_offsets, self.bias, self.row_index)
        return *tensors, *self.sizes, self.activation, "rebuild" if strategy in (WIDE, *CHIP) else strategy, "triton"

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        with poisoned_memory():
            call = ForwardCall(*self._common(strategy), save)
            if strategy in CHIP:
                return forward_on_chip(call, strategy == ON_CHIP_FROM_HALF)
            return forward_by_steps(call, strategy == WIDE)

    def backward(
        self, strategy: str, y: Tensor, h: Tensor, z: Tensor, need: list[bool], inverse: bool = True
    ) -> tuple[Tensor, ...]:
        """With ``inverse``, the call contains the inverse of ``row_index``."""
        saved = y if self.activation == "relu" else z
        with poisoned_memory():
            call = BackwardCall(
                *self._common(strategy), self.grad, h, saved, need, self.slot_of_token if inverse else None
            )
            half = strategy == ON_CHIP_FROM_HALF
            return backward_on_chip(call, half) if strategy in CHIP else backward_by_steps(call, strategy == WIDE)

    def run(self, strategy: str, backward_strategy: str | None = None) -> list[Tensor]:
        y, h, z = self.forward(strategy)
        need = [True] * 4 + [self.with_bias]
        grads = self.backward(backward_strategy or strategy, y, h, z, need)
        return [y, *grads[: 5 if self.with_bias else 4]]
