"""One grouped MPO product with its gradients: inputs, the reference, and the comparison of some kernels with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from mpoe_bench.cases import expert_choice, random_blocks, relative_error
from torch import Tensor

from mpoe_kernels.contract import STRATEGIES
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.reference import grouped_mpo_linear_reference
from mpoe_kernels.routing.op import route

from .assertions import assert_calibrated

NAMES = ("y", "dx", "dleft", "dcentral", "dright", "dbias")


def planned_strategies(shape: MPOShape) -> list[str]:
    """What the planner may ask for: ``separable`` is the chain of its shapes."""
    return [s for s in STRATEGIES if s != ("chain" if shape.is_separable else "separable")]


@dataclass
class LinearProblem:
    """Rounded inputs of one product.

    Attributes:
        shape, dtype, experts, activation: of the layer.
        tokens, top_k, kind, capacity, mask: of the routing, see `expert_choice`.
        with_bias, gathered: whether there is a bias; whether slots read rows of x through ``row_index``.
    """

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
    mask: Tensor | None = None
    x: Tensor = field(init=False)

    def __post_init__(self) -> None:
        index = expert_choice(self.kind, self.tokens, self.experts, min(self.top_k, self.experts))
        self.routing = route(index, self.experts, self.capacity, self.mask, backend="eager")
        slots = self.routing.token_of_slot.shape[0]
        blocks = random_blocks(self.shape, self.experts)
        self.blocks = [t.to(self.dtype) for t in (blocks.left, blocks.central, blocks.right)]
        self.x = torch.randn(self.tokens if self.gathered else slots, self.shape.in_features).to(self.dtype)
        self.bias = torch.randn(self.shape.out_features).to(self.dtype) if self.with_bias else None
        self.grad = torch.randn(slots, self.shape.out_features).to(self.dtype)
        if self.activation == "relu":  # its gradient jumps at zero: rounding must not decide the side
            z = self.reference(torch.float64, activation="none")[0]
            self.grad = self.grad * (z.detach().abs() > 0.1)

    @property
    def sizes(self) -> tuple[int, int]:
        """I and F."""
        return self.shape.in_features, self.shape.out_features

    @property
    def row_index(self) -> Tensor | None:
        """Row of x that each slot reads."""
        return self.routing.token_of_slot if self.gathered else None

    @property
    def slot_of_token(self) -> Tensor | None:
        """Its inverse."""
        return self.routing.slot_of_token if self.gathered else None

    @property
    def filled(self) -> int:
        """Slots that an expert owns."""
        return int(self.routing.expert_offsets[-1])

    def run(self, strategy: str, backward_strategy: str | None = None) -> Sequence[Tensor]:
        """``y`` and every gradient by the kernels under test; that of the bias, the last one, may be left out."""
        raise NotImplementedError

    def reference(self, dtype: torch.dtype, activation: str | None = None) -> list[Tensor]:
        """The same by `mpoe_kernels.reference`; with another activation only ``y``, the gradients are zero.

        Without a bias the gradient is that of a bias of zeros.
        """
        leaves = [t.to(dtype).requires_grad_() for t in (self.x, *self.blocks)]
        bias = (torch.zeros(self.sizes[1]) if self.bias is None else self.bias).to(dtype).requires_grad_()
        x, left, central, right = leaves
        y = grouped_mpo_linear_reference(
            x,
            MPOBlocks(left, central, right, *self.sizes),
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
        assert len(actual) >= len(truth) - 1
        for name, a, t, s in zip(NAMES, actual, truth, same, strict=False):
            if self.dtype == torch.float64:  # the truth has the same rounding
                assert relative_error(a, t) < 1e-13, f"{name} ({strategy})"
            else:
                assert_calibrated(a, t, s, f"{name} ({strategy})", factor)
        assert bool((actual[0][self.filled :] == 0).all())
