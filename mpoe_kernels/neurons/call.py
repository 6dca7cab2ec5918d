"""The arguments of the `neuron_experts` kernels, the same for every backend.

These classes are the ops' signatures: the schemas are derived from their fields.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class NeuronCall:
    """A forward pass of `mpoe_kernels.neuron_experts`. Its kernel returns ``o [T, O]``.

    Attributes:
        x: ``[T, I]``.
        gates: floating ``[T, K]``.
        top_k_index: int64 ``[T, K]``; -1: no expert.
        up: ``[E, m, I]``; dtype of x.
        down: ``[E, m, O]``.
        bias: ``[E, m]`` or None.
        gate_up: ``[E, m, I]`` of gated experts, or None.
        activation: none, relu, gelu, gelu_tanh or silu.
        backend: the requested backend, or ``"auto"``.
    """

    x: Tensor
    gates: Tensor
    top_k_index: Tensor
    up: Tensor
    down: Tensor
    bias: Tensor | None
    gate_up: Tensor | None
    activation: str
    backend: str

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, gates, up, down, bias, gate_up: the differentiable arguments, in the order of the gradients."""
        return self.x, self.gates, self.up, self.down, self.bias, self.gate_up

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]


@dataclass
class NeuronBackwardCall(NeuronCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients that are not needed are
    empty.

    Attributes: grad: ``[T, O]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]

    @property
    def wanted(self) -> list[bool]:
        """Which gradients are needed and belong to an argument that was given."""
        return [value is not None and wants for value, wants in zip(self.differentiable, self.need, strict=True)]
