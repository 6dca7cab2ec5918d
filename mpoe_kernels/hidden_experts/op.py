"""`hidden_experts`: its arguments, kernels and public function.

A feed-forward network is ``act(x C1) C2``. Experts that own blocks only on the hidden side have the
weights ``C1 (1_G (x) R_e)`` and ``(1_G (x) L_e) C2``: both dense products run once per token,
whatever the number of experts, and this op computes the part between them. Forward saves its
inputs; backward recomputes the hidden activations from ``u``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpoe_kernels.backends import add_kernels, lazily
from mpoe_kernels.checks import (
    check_choice,
    check_device,
    check_floating,
    check_index,
    check_same,
    check_tensor,
    describe,
)
from mpoe_kernels.define import (
    Differentiable,
    backend_kernel,
    define_differentiable,
    requested_backend,
)
from mpoe_kernels.hidden_experts import eager, native

# Activation names in Hugging Face configs -> names in the kernels.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "none": "none",
}
KERNELS = {
    "native": native,
    "eager": eager,
    "triton": lazily("mpoe_kernels.hidden_experts.triton", "forward", "backward"),
}
FUNCTIONS = {"hidden_experts": "forward", "hidden_experts_backward": "backward"}
for _backend, _kernels in KERNELS.items():
    add_kernels(_backend, _kernels, FUNCTIONS)


@dataclass
class HiddenCall(Differentiable):
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

    DIFFERENTIABLE = ("u", "gates", "right", "left", "bias", "u_gate", "right_gate")

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
        """``gelu_new`` becomes ``gelu_tanh`` where results need not be bit-identical to
        Transformers' formula."""
        return "gelu_tanh" if self.activation == "gelu_new" else self.activation


@dataclass
class HiddenBackwardCall(HiddenCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients
    that are not needed are empty.

    Attributes: grad: ``[T, F]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]


def _fake(call: HiddenCall) -> Tensor:
    return call.u.new_empty(call.u.shape)


_forward = define_differentiable(
    "hidden_experts",
    HiddenCall,
    HiddenBackwardCall,
    {op: backend_kernel(op, "u") for op in FUNCTIONS},
    _fake,
    autocast=(
        "u",
        "right",
        "left",
        "bias",
        "u_gate",
        "right_gate",
    ),  # gates keep the router's float32
)


def hidden_experts(
    u: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    right: Tensor,
    left: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    u_gate: Tensor | None = None,
    right_gate: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``o[t, g, :] = sum_k gates[t, k] * act(u[t, g, :] R_e + bias_e) L_e`` with ``e =
    top_k_index[t, k]``.

    With ``u_gate`` the hidden activation is ``act(u_gate R^gate_e + bias_e) * (u R_e)``. F = G b
    hidden units form G groups of b consecutive ones. Blocks with G' = 1 are shared by the groups:
    plain MPO cores. With G' = G each group has its own: a block-diagonal core.

    Args:
        u: ``[T, F]``, floating: the first dense product, before the activation.
        gates: ``[T, K]``, floating, used as given.
        top_k_index: int32 or int64 ``[T, K]``, entries in ``-1..E-1``; -1 = no expert. Out of range
            entries are refused on the CPU.
        right, left: ``[E, G', b, b]`` or, if shared by the groups, ``[E, b, b]``; both have the
            same shape.
        bias: ``[E, F]``, one per expert, added before the activation.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"silu"``,
            ``"swish"`` or ``"none"``.
        u_gate: ``[T, F]``: the dense product of a gated network that goes through the activation.
        right_gate: as ``right``; given with ``u_gate``.
        backend: name of a backend, or ``None`` / ``"auto"``.

    Returns:
        ``[T, F]`` in the dtype of ``u``. Differentiable once in every floating argument.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named with
            what was expected.
        BackendError: the named backend cannot run it.
    """
    right, left = _blocks("right", right), _blocks("left", left)
    right_gate = None if right_gate is None else _blocks("right_gate", right_gate)
    check_floating("u", check_tensor("u", u, ("T", "F")))
    check_floating("gates", check_tensor("gates", gates, ("T", "K")))
    index = check_index("top_k_index", top_k_index, ("T", "K"))
    if gates.shape[0] != u.shape[0]:
        raise ValueError(f"gates must be [T, K] with T = {u.shape[0]}; got {describe(gates)}")
    if index.shape != gates.shape:
        raise ValueError(
            f"top_k_index must be {list(gates.shape)} like gates; got {describe(top_k_index)}"
        )
    features, groups, size = u.shape[1], right.shape[1], right.shape[2]
    if features % size or groups not in (1, features // size):
        raise ValueError(
            f"right must be [E, G', b, b] with b a divisor of F = {features} and G' = 1 or F / b; "
            f"got {describe(right)}"
        )
    if left.shape != right.shape:
        raise ValueError(f"left must be {list(right.shape)} like right; got {describe(left)}")
    if (u_gate is None) != (right_gate is None):
        given = ["None" if each is None else "a tensor" for each in (u_gate, right_gate)]
        raise ValueError(
            f"right_gate must be given with u_gate, and only with it; got u_gate {given[0]} and "
            f"right_gate {given[1]}"
        )
    if u_gate is not None and right_gate is not None:
        if u_gate.shape != u.shape:
            raise ValueError(f"u_gate must be {list(u.shape)} like u; got {describe(u_gate)}")
        if right_gate.shape != right.shape:
            raise ValueError(
                f"right_gate must be {list(right.shape)} like right; got {describe(right_gate)}"
            )
    if bias is not None:
        check_tensor("bias", bias, ("E", "F"))
        if bias.shape != (right.shape[0], u.shape[1]):
            raise ValueError(
                f"bias must be [E, F] = {[right.shape[0], u.shape[1]]}; got {describe(bias)}"
            )
    check_choice("activation", activation, ACTIVATIONS)
    check_same("u", u, right=right, left=left, bias=bias, u_gate=u_gate, right_gate=right_gate)
    check_device("u", u, gates=gates, top_k_index=index)
    return _forward(
        *(u, gates, index.long(), right, left, bias, u_gate, right_gate),
        *(ACTIVATIONS[activation], requested_backend(backend)),
    )


def _blocks(name: str, value: Any) -> Tensor:
    """``[E, G', b, b]`` from that or from ``[E, b, b]``."""
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        raise TypeError(f"{name} must be a tensor [E, b, b] or [E, G, b, b]; got {describe(value)}")
    blocks = value if value.dim() == 4 else value[:, None]
    if 0 in blocks.shape or blocks.shape[2] != blocks.shape[3]:
        raise ValueError(f"{name} must be [E, G', b, b] with E, G', b >= 1; got {describe(value)}")
    return blocks
