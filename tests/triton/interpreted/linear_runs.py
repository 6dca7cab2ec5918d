"""One grouped MPO product, forward and backward, by the Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels import MPOShape
from mpoe_kernels.backends.linear_call import BackwardCall, ForwardCall
from mpoe_kernels.backends.triton.linear import linear_backward, linear_forward
from mpoe_kernels.testing.assertions import poisoned_memory
from mpoe_kernels.testing.linear_problem import LinearProblem, planned_strategies

ON_CHIP = "on_chip"  # the strategy ``rebuild`` by the fused kernels


def strategies_of(shape: MPOShape) -> list[str]:
    """What the planner may ask for, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


class Case(LinearProblem):
    """A strategy may be ``on_chip``."""

    def _common(self, strategy: str) -> tuple[Any, ...]:
        tensors = (self.x, *self.blocks, self.routing.expert_offsets, self.bias, self.row_index)
        return *tensors, *self.sizes, self.activation, "rebuild" if strategy == ON_CHIP else strategy, "triton"

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        with poisoned_memory():
            return linear_forward(ForwardCall(*self._common(strategy), save), strategy == ON_CHIP)

    def backward(self, strategy: str, y: Tensor, h: Tensor, z: Tensor, need: list[bool]) -> tuple[Tensor, ...]:
        saved = y if self.activation == "relu" else z
        with poisoned_memory():
            call = BackwardCall(*self._common(strategy), self.grad, h, saved, need)
            return linear_backward(call, strategy == ON_CHIP)

    def run(self, strategy: str, backward_strategy: str | None = None) -> list[Tensor]:
        y, h, z = self.forward(strategy)
        need = [True] * 4 + [self.with_bias]
        grads = self.backward(backward_strategy or strategy, y, h, z, need)
        return [y, *grads[: 5 if self.with_bias else 4]]
