"""The arguments of the grouped MPO linear's kernels, the same for every backend.

These classes are the ops' signatures: the schemas are derived from their fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from mpoe_kernels.planner import BlockDims


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
        strategy: one of `mpoe_kernels.planner.STRATEGIES`; ``"auto"`` until the registry has chosen.
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
        return self.save and self.strategy in ("auto", "separable") and self.left.shape[2] == self.right.shape[2] == 1

    @property
    def saves_z(self) -> bool:
        """Whether z, the pre-activation ``[N, F]``, is saved: the gradient of relu reads y; without an activation
        neither is read."""
        return self.save and self.activation not in ("none", "relu")


@dataclass
class GatedCall(LinearCall):
    """A forward pass of two projections of the same rows: ``y = activation(x W_gate) * (x W + bias)``.

    Its kernel returns ``(y, z, value [N, F], h, gate_h)``: the input of the activation (for relu, its result), the
    other factor, and h of both as in `ForwardCall`; all except y are empty unless a backward will need them.

    Attributes:
        gate_left, gate_central, gate_right: blocks of ``W_gate``; ``left``, ... are those of the other projection.
        save, slot_of_token: as in `ForwardCall`.
    """

    gate_left: Tensor
    gate_central: Tensor
    gate_right: Tensor
    save: bool
    slot_of_token: Tensor | None = None

    @cached_property
    def up(self) -> ForwardCall:
        """The projection without an activation, alone."""
        return self._alone(self.blocks, self.bias, "none")

    @cached_property
    def gate(self) -> ForwardCall:
        """The projection with the activation, alone."""
        return self._alone((self.gate_left, self.gate_central, self.gate_right), None, self.activation)

    def _alone(self, blocks: tuple[Tensor, Tensor, Tensor], bias: Tensor | None, activation: str) -> ForwardCall:
        return ForwardCall(
            *(self.x, *blocks, self.expert_offsets, bias, self.row_index),
            in_features=self.in_features,
            out_features=self.out_features,
            activation=activation,
            strategy=self.strategy,
            backend=self.backend,
            save=self.save,
            slot_of_token=self.slot_of_token,
        )


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
