"""The arguments of the grouped MPO linear's kernels, the same for every backend.

These classes are the ops' signatures: the schemas are derived from their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.backends import keeps_rows
from mpoe_kernels.contract.autotune import EXAMPLES
from mpoe_kernels.contract.orders import BlockDims, expected_busy_experts
from mpoe_kernels.contract.ranking import Problem


@dataclass
class LinearCall:
    """One call of `mpoe_kernels.grouped_mpo_linear`, forward or backward.

    Attributes:
        x: ``[T, I]``; without ``row_index`` ``[N, I]``, in slot order.
        left, central, right: folded blocks ``[E, iL, jL, a]``, ``[a, iC, jC, b]``, ``[E, b, iR, jR]``, dtype of x.
        expert_offsets: integers ``[E + 1]``.
        bias: ``[F]`` or None.
        row_index: int64 ``[N]`` or None.
        in_features, out_features: I and F.
        activation: a value of `mpoe_kernels.linear.op.ACTIVATIONS`.
        strategy: one of `mpoe_kernels.contract.STRATEGIES`; ``"auto"`` until the registry has chosen.
        backend: the requested backend, or ``"auto"``.
    """

    x: Tensor
    left: Tensor
    central: Tensor
    right: Tensor
    expert_offsets: Tensor
    bias: Tensor | None
    row_index: Tensor | None
    in_features: int
    out_features: int
    activation: str
    strategy: str
    backend: str

    @cached_property
    def dims(self) -> BlockDims:
        """Sizes of the blocks."""
        return BlockDims.of_blocks(self.left, self.central, self.right, self.in_features, self.out_features)

    @property
    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """left, central, right."""
        return self.left, self.central, self.right

    @property
    def num_experts(self) -> int:
        """E."""
        return self.left.shape[0]

    @property
    def slots(self) -> int:
        """N."""
        return self.x.shape[0] if self.row_index is None else self.row_index.shape[0]


@dataclass
class ForwardCall(LinearCall):
    """A forward pass. Its kernel returns ``(y [N, F], h, z)``; h and z are empty unless a backward will need them.

    Attributes:
        save: whether a backward may follow.
        slot_of_token: for the backward, or with ``out_index``.
        out_index: int64 ``[N]``, a permutation: the row of y to which each slot is scattered, times its gate; empty
            slots write zeros. Never with ``save``, and only for backends that place rows.
        gates: float32 ``[N]`` by row of y, with ``out_index``.
    """

    save: bool
    slot_of_token: Tensor | None = None
    out_index: Tensor | None = None
    gates: Tensor | None = None

    @cached_property
    def saves_h(self) -> bool:
        """Whether the strategy is ``separable`` and h, the rows ``[N jC, b]`` after its central step, is saved.

        The rule does not depend on slot counts, so it also works for fakes and before the registry has chosen.
        """
        is_separable = self.strategy in ("auto", "separable") and self.left.shape[2] == self.right.shape[2] == 1
        return self.save and is_separable and keeps_rows(self.backend)

    @property
    def saves_z(self) -> bool:
        """Whether z, the pre-activation ``[N, F]``, is saved: the gradient of relu reads y; without an activation
        neither is read."""
        return self.save and self.activation not in ("none", "relu")


@dataclass
class BackwardCall(LinearCall):
    """A backward pass. Its kernel returns ``(dx, dleft, dcentral, dright, dbias)``; gradients that are not needed are
    empty.

    Attributes: grad: ``[N, F]``. h: from the forward. saved: y for relu, z for other activations. need: which of the
        results. slot_of_token: int64 ``[T, K]`` or None, the slots that read each row of x; -1: none.
    """

    grad: Tensor
    h: Tensor
    saved: Tensor
    need: list[bool]
    slot_of_token: Tensor | None = None

    @property
    def need_of_plan(self) -> tuple[bool, bool, bool, bool]:
        """All except the bias's, which no contraction computes."""
        x, left, central, right, _ = self.need
        return x, left, central, right

    @property
    def saved_h(self) -> Tensor | None:
        """h, if the strategy reads it and the forward saved it."""
        return self.h if self.strategy == "separable" and self.h.numel() else None


def _made_up(problem: Problem, experts: int, slots: int) -> dict[str, Any]:
    """Arguments of a `LinearCall` on constants: the slots spread evenly over as many experts as are expected to be
    busy. It draws no random numbers."""
    d = problem.dims
    shapes = (slots, d.in_features), (experts, d.iL, d.jL, d.a), (d.a, d.iC, d.jC, d.b), (experts, d.b, d.iR, d.jR)
    tensors = (torch.full(shape, 0.01, dtype=problem.dtype, device=problem.device) for shape in shapes)
    busy = expected_busy_experts(experts, slots)
    ends = [slots * min(e, busy) // busy for e in range(experts + 1)]
    return dict(
        zip(("x", "left", "central", "right"), tensors, strict=True),
        expert_offsets=torch.tensor(ends, dtype=torch.int32, device=problem.device),
        bias=None,
        row_index=None,
        in_features=d.in_features,
        out_features=d.out_features,
        activation="none",
        strategy=problem.strategy,
        backend=problem.backend,
    )


def example_forward(problem: Problem, experts: int, slots: int) -> ForwardCall:
    """A forward to time, with other numbers of experts and slots."""
    return ForwardCall(**_made_up(problem, experts, slots), save=problem.keeps)


def example_backward(problem: Problem, experts: int, slots: int) -> BackwardCall:
    """A backward to time."""
    common = _made_up(problem, experts, slots)
    x, d = common["x"], problem.dims
    grad = x.new_full((slots, d.out_features), 0.01)
    h = x.new_full((slots * d.jC, d.b) if d.is_separable else (0,), 0.01)
    return BackwardCall(**common, grad=grad, h=h, saved=x.new_empty(0), need=[*problem.need, False])


EXAMPLES.update(grouped_mpo_linear=example_forward, grouped_mpo_linear_backward=example_backward)
