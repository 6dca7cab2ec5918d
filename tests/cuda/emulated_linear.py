"""One grouped MPO product, forward and backward, by the emulated CUDA kernels and by the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from emulation import Linear
from torch import Tensor

from mpoe_kernels import MPOBlocks, MPOShape, route
from mpoe_kernels.planner import STRATEGIES
from mpoe_kernels.reference import grouped_mpo_linear_reference
from mpoe_kernels.testing.assertions import assert_calibrated
from mpoe_kernels.testing.cases import expert_choice, random_blocks

NAMES = ("y", "dx", "dleft", "dcentral", "dright", "dbias")
ALL = [True] * 5


def strategies_of(shape: MPOShape) -> list[str]:
    """What the planner may ask for."""
    return [s for s in STRATEGIES if s != ("chain" if shape.is_separable else "separable")]


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
    tf32: bool = False
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        index = expert_choice(self.kind, self.tokens, self.experts, self.top_k)
        self.routing = route(index, self.experts, self.capacity, backend="eager")
        slots = self.routing.token_of_slot.shape[0]
        blocks = random_blocks(self.shape, self.experts)
        self.blocks = [t.to(self.dtype) for t in (blocks.left, blocks.central, blocks.right)]
        self.x = torch.randn(self.tokens if self.gathered else slots, self.shape.in_features).to(self.dtype)
        self.bias = torch.randn(self.shape.out_features).to(self.dtype) if self.with_bias else None
        self.grad = torch.randn(slots, self.shape.out_features).to(self.dtype)
        if self.activation == "relu":  # its gradient jumps at zero: rounding must not decide the side
            z = self.reference(torch.float64, activation="none")[0]
            self.grad = self.grad * (z.detach().abs() > 0.1)
        filled = int(self.routing.expert_offsets[-1])
        self.grad[filled:] = float("nan")  # of slots that no expert owns: never read
        self.linear = Linear(
            self.x, self.blocks, self.routing.expert_offsets, self.bias, self.row_index, *self.sizes, self.activation,
            self.tf32,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, int]:
        return self.shape.in_features, self.shape.out_features

    @property
    def row_index(self) -> Tensor | None:
        return self.routing.token_of_slot if self.gathered else None

    def run(self, strategy: str, backward_strategy: str | None = None, need: list[bool] = ALL) -> list[Tensor | None]:
        """``y`` and every gradient by the CUDA kernels."""
        y, h, z = self.linear.forward(strategy)
        saved = y if self.activation == "relu" else z
        return [y, *self.linear.backward(backward_strategy or strategy, self.grad, h, saved, need)]

    def reference(self, dtype: torch.dtype, activation: str | None = None) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, *self.blocks)]
        bias = (torch.zeros(self.sizes[1]) if self.bias is None else self.bias).to(dtype).requires_grad_()
        x, *blocks = leaves
        y = grouped_mpo_linear_reference(
            x,
            MPOBlocks(*blocks, *self.sizes),
            self.routing.expert_offsets,
            bias,
            row_index=self.row_index,
            activation=self.activation if activation is None else activation,
        )
        inputs = [*leaves, bias]
        if not y.requires_grad or activation is not None:
            return [y, *(torch.zeros_like(t) for t in inputs)]
        grad = self.grad.to(dtype).nan_to_num(0)
        found = torch.autograd.grad(y, inputs, grad, allow_unused=True)
        return [y, *(torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True))]

    def check(self, strategy: str, backward_strategy: str | None = None, factor: float = 2) -> None:
        """Compare everything with the float64 reference, calibrated by the reference in the same dtype."""
        actual = self.run(strategy, backward_strategy)
        truth, same = self.reference(torch.float64), self.reference(self.dtype)
        for name, a, t, s in zip(NAMES, actual, truth, same, strict=True):
            assert a is not None
            assert_calibrated(a, t, s, f"{name} ({strategy})", factor)
        assert bool((actual[0][int(self.routing.expert_offsets[-1]) :] == 0).all())
