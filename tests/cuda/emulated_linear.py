"""One grouped MPO product, forward and backward, by the emulated CUDA kernels."""

from __future__ import annotations

from torch import Tensor

from tests.linear_problem import LinearProblem

from .emulation import Linear

ALL = [True] * 5


class Case(LinearProblem):
    """By the emulated kernels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grad[self.filled :] = float("nan")  # slots without an expert: never read
        self.linear = Linear(
            self.x, self.blocks, self.routing.expert_offsets, self.bias, self.row_index, *self.sizes, self.activation
        )

    def run(self, strategy: str, backward_strategy: str | None = None, need: list[bool] | None = None) -> list[Tensor]:
        """The result and its gradients, by default all that there are; gradients that are not needed are None."""
        y, h, z = self.linear.forward(strategy)
        saved, backward_strategy = y if self.activation == "relu" else z, backward_strategy or strategy
        h = h if backward_strategy == "separable" else None
        wanted = need or [True] * 4 + [self.with_bias]
        grads = self.linear.backward(self.grad, h, saved, wanted, self.slot_of_token, backward_strategy)
        return [y, *grads[: 5 if need or self.with_bias else 4]]
