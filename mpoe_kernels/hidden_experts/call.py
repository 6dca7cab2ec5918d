"""The arguments of the `hidden_experts` kernels, the same for every backend.

These classes are the ops' signatures: the schemas are derived from their fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class HiddenCall:
    """A forward pass of `mpoe_kernels.hidden_experts`. Its kernel returns ``o [T, F]``.

    Attributes:
        u: ``[T, F]``.
        gates: floating ``[T, K]``.
        top_k_index: int64 ``[T, K]``; -1: no expert.
        right, left: blocks ``[E, G', b, b]``, G' = 1 if the groups share them; dtype of u.
        bias: ``[E, F]`` or None.
        u_gate: ``[T, F]`` of a gated network, or None.
        right_gate: as ``right``, given with ``u_gate``.
        activation: a value of `mpoe_kernels.hidden_experts.op.ACTIVATIONS`.
        backend: the requested backend, or ``"auto"``.
    """

    u: Tensor
    gates: Tensor
    top_k_index: Tensor
    right: Tensor
    left: Tensor
    bias: Tensor | None
    u_gate: Tensor | None
    right_gate: Tensor | None
    activation: str
    backend: str

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """u, gates, right, left, bias, u_gate, right_gate: the differentiable arguments, in the order of the
        gradients."""
        return self.u, self.gates, self.right, self.left, self.bias, self.u_gate, self.right_gate

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor, in the order of the fields."""
        u, gates, *others = self.differentiable
        return u, gates, self.top_k_index, *others

    @property
    def num_experts(self) -> int:
        """E."""
        return self.right.shape[0]

    @property
    def block(self) -> int:
        """b."""
        return self.right.shape[-1]

    @property
    def kernel_activation(self) -> str:
        """``gelu_new`` becomes ``gelu_tanh`` where results need not be bit-identical to Transformers' formula."""
        return "gelu_tanh" if self.activation == "gelu_new" else self.activation


@dataclass
class HiddenBackwardCall(HiddenCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients that are not needed are
    empty.

    Attributes: grad: ``[T, F]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]

    @property
    def wanted(self) -> list[bool]:
        """Which gradients are needed and belong to an argument that was given."""
        return [value is not None and wants for value, wants in zip(self.differentiable, self.need, strict=True)]
