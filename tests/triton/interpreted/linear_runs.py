"""One grouped MPO product, forward and backward, by the Triton kernels."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.linear.op import BackwardCall, ForwardCall
from mpoe_kernels.linear.triton import BY_PRODUCTS, fused_launch
from tests.assertions import poisoned_memory
from tests.linear_problem import LinearProblem, planned_strategies


def strategies_of(shape: MPOShape) -> list[str]:
    """What the planner may choose, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


def kernels_of(strategy: str) -> Any:
    """Its ``forward`` and ``backward``."""
    return fused_launch if strategy == ON_CHIP else BY_PRODUCTS


class Case(LinearProblem):
    """A strategy may be `ON_CHIP`: ``rebuild`` by the fused kernels."""

    def _common(self, strategy: str) -> tuple[Any, ...]:
        tensors = (self.x, *self.blocks, self.routing.expert_offsets, self.bias, self.row_index)
        return *tensors, *self.sizes, self.activation, "rebuild" if strategy == ON_CHIP else strategy, "triton"

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        with poisoned_memory():
            return kernels_of(strategy).forward(ForwardCall(*self._common(strategy), save))

    def backward(
        self, strategy: str, y: Tensor, h: Tensor, z: Tensor, need: list[bool], inverse: bool = True
    ) -> tuple[Tensor, ...]:
        """With ``inverse``, the call contains the inverse of ``row_index``."""
        saved = y if self.activation == "relu" else z
        with poisoned_memory():
            call = BackwardCall(
                *self._common(strategy), self.grad, h, saved, need, self.slot_of_token if inverse else None
            )
            return kernels_of(strategy).backward(call)

    def run(self, strategy: str, backward_strategy: str | None = None) -> list[Tensor]:
        y, h, z = self.forward(strategy)
        need = [True] * 4 + [self.with_bias]
        grads = self.backward(backward_strategy or strategy, y, h, z, need)
        return [y, *grads[: 5 if self.with_bias else 4]]
