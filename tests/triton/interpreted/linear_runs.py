"""One grouped MPO product, forward and backward, by the Triton kernels and by the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape, route
from mpoe_kernels.backends.triton.linear import linear_backward, linear_forward
from mpoe_kernels.planner import STRATEGIES
from mpoe_kernels.reference import grouped_mpo_linear_reference
from mpoe_kernels.testing.assertions import assert_calibrated, poisoned_memory
from mpoe_kernels.testing.cases import expert_choice, random_blocks

ON_CHIP = "on_chip"  # the strategy ``rebuild`` by the fused kernels
NAMES = ("y", "dx", "dleft", "dcentral", "dright", "dbias")


def planned_strategies(shape: MPOShape) -> list[str]:
    """What the planner may ask for."""
    return [s for s in STRATEGIES if s != ("chain" if shape.is_separable else "separable")]


def strategies_of(shape: MPOShape) -> list[str]:
    """The same, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


def _way(strategy: str) -> tuple[str, bool]:
    return ("rebuild", True) if strategy == ON_CHIP else (strategy, False)


@dataclass
class Case:
    """Rounded inputs of one product."""

    shape: MPOShape
    dtype: torch.dtype = torch.float32
    tokens: int = 7
    experts: int = 3
    top_k: int = 2
    kind: str = "zipf"
    capacity: int | None = 4
    activation: str = "gelu"
    with_bias: bool = True
    gathered: bool = True
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        index = expert_choice(self.kind, self.tokens, self.experts, self.top_k)
        self.routing = route(index, self.experts, self.capacity)
        slots = self.routing.token_of_slot.shape[0]
        blocks = random_blocks(self.shape, self.experts)
        self.blocks = [t.to(self.dtype) for t in (blocks.left, blocks.central, blocks.right)]
        self.x = torch.randn(self.tokens if self.gathered else slots, self.shape.in_features).to(self.dtype)
        self.bias = torch.randn(self.shape.out_features).to(self.dtype) if self.with_bias else None
        self.grad = torch.randn(slots, self.shape.out_features).to(self.dtype)
        if self.activation == "relu":  # its gradient jumps at zero: rounding must not decide the side
            z = self._reference(torch.float64, activation="none")[0]
            self.grad = self.grad * (z.detach().abs() > 0.1)

    @property
    def sizes(self) -> tuple[int, int]:
        return self.shape.in_features, self.shape.out_features

    @property
    def row_index(self) -> Tensor | None:
        return self.routing.token_of_slot if self.gathered else None

    def forward(self, strategy: str, save: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """By the steps of a strategy, or by the fused kernels as the strategy ``on_chip``."""
        strategy, on_chip = _way(strategy)
        with poisoned_memory():
            return linear_forward(
                self.x, *self.blocks, self.routing.expert_offsets, self.bias, self.row_index, *self.sizes,
                self.activation, strategy, save, on_chip,
            )  # fmt: skip

    def backward(self, strategy: str, y: Tensor, h: Tensor, z: Tensor, need: list[bool]) -> tuple[Tensor, ...]:
        saved = y if self.activation == "relu" else z
        strategy, on_chip = _way(strategy)
        with poisoned_memory():
            return linear_backward(
                self.grad, self.x, *self.blocks, self.routing.expert_offsets, self.row_index, h, saved, *self.sizes,
                self.activation, strategy, need, on_chip,
            )  # fmt: skip

    def run(self, strategy: str, backward_strategy: str | None = None) -> list[Tensor]:
        """``y`` and every gradient by the Triton kernels."""
        y, h, z = self.forward(strategy)
        need = [True] * 4 + [self.with_bias]
        grads = self.backward(backward_strategy or strategy, y, h, z, need)
        return [y, *grads[: 5 if self.with_bias else 4]]

    def _reference(self, dtype: torch.dtype, activation: str | None = None) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, *self.blocks)]
        bias = None if self.bias is None else self.bias.to(dtype).requires_grad_()
        x, *blocks = leaves
        y = grouped_mpo_linear_reference(
            x,
            MPOBlocks(*blocks, *self.sizes),
            self.routing.expert_offsets,
            bias,
            row_index=self.row_index,
            activation=self.activation if activation is None else activation,
        )
        inputs = leaves if bias is None else [*leaves, bias]
        if not y.requires_grad or activation is not None:
            return [y, *(torch.zeros_like(t) for t in inputs)]
        found = torch.autograd.grad(y, inputs, self.grad.to(dtype), allow_unused=True)
        return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))]

    def check(self, strategy: str, backward_strategy: str | None = None, factor: float = 2) -> None:
        """Compare everything with the float64 reference, calibrated by the reference in the same dtype."""
        actual = self.run(strategy, backward_strategy)
        truth, same = self._reference(torch.float64), self._reference(self.dtype)
        for name, a, t, s in zip(NAMES, actual, truth, same, strict=False):
            assert_calibrated(a, t, s, f"{name} ({strategy})", factor)
        assert bool((actual[0][int(self.routing.expert_offsets[-1]) :] == 0).all())
