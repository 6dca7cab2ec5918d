"""One grouped MPO product, forward and backward, by the emulated CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tests.linear_problem import LinearProblem

from .emulation import Linear

ALL = [True] * 5


@dataclass
class Case(LinearProblem):
    """With ``tf32``, float32 is multiplied as TF32."""

    tf32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.grad[self.filled :] = float("nan")  # slots without an expert: never read
        self.linear = Linear(
            self.x, self.blocks, self.routing.expert_offsets, self.bias, self.row_index, *self.sizes, self.activation,
            self.tf32,
        )  # fmt: skip

    def run(self, strategy: str, backward_strategy: str | None = None, need: list[bool] = ALL) -> list[Tensor]:
        """The result and its gradients; gradients that are not needed are None."""
        y, h, z = self.linear.forward()
        saved = y if self.activation == "relu" else z
        return [y, *self.linear.backward(self.grad, h, saved, need, self.slot_of_token)]
