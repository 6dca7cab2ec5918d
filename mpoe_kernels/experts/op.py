"""`hidden_experts` and `neuron_experts`: their arguments, kernels and public functions.

Both compute ``sum_k gates[t, k] * act(x R_e + bias_e) L_e`` with ``e = top_k_index[t, k]``. A
feed-forward network is ``act(x C1) C2``. Hidden-side experts own blocks only on the hidden side and
have the weights ``C1 (1_G (x) R_e)`` and ``(1_G (x) L_e) C2``: both dense products run once per
token, whatever the number of experts, and the op computes the part between them. Experts of neurons
own m hidden neurons beside a dense network. A neuron is one row of ``up``, ``down``, ``bias`` and
``gate_up``: adding, removing and merging neurons are slices. Forward saves its inputs; backward
recomputes the hidden activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

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
from mpoe_kernels.experts import eager, native

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
        activation: a value of `mpoe_kernels.experts.op.ACTIVATIONS`.
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

    OP: ClassVar = "hidden_experts"
    DIFFERENTIABLE = ("u", "gates", "right", "left", "bias", "u_gate", "right_gate")
    # The names of x, gates, top_k_index, right, left, bias, x_gate and right_gate, which kernels of
    # both forms read.
    OPERANDS: ClassVar = (
        "u",
        "gates",
        "top_k_index",
        "right",
        "left",
        "bias",
        "u_gate",
        "right_gate",
    )

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor, in the order of the fields."""
        return tuple([getattr(self, name) for name in self.OPERANDS])

    @property
    def num_experts(self) -> int:
        """E."""
        return self.right.shape[0]

    @property
    def block(self) -> int:
        """b."""
        return self.right.shape[-1]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """F, b, G'."""
        return self.u.shape[1], self.block, self.right.shape[1]

    @property
    def out_features(self) -> int:
        """F."""
        return self.u.shape[1]

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

    OP: ClassVar = "hidden_experts_backward"


@dataclass
class NeuronCall(Differentiable):
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

    OP: ClassVar = "neuron_experts"
    DIFFERENTIABLE = ("x", "gates", "up", "down", "bias", "gate_up")
    # As in `HiddenCall`; x is read for both.
    OPERANDS: ClassVar = ("x", "gates", "top_k_index", "up", "down", "bias", None, "gate_up")

    @property
    def num_experts(self) -> int:
        """E."""
        return self.up.shape[0]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """I, O, m."""
        return self.x.shape[1], self.down.shape[2], self.up.shape[1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.down.shape[2]


@dataclass
class NeuronBackwardCall(NeuronCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients
    that are not needed are empty.

    Attributes: grad: ``[T, O]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]

    OP: ClassVar = "neuron_experts_backward"


def _define(call: type[Any], backward_call: type[Any], triton: str) -> Any:
    """The op of one form; ``triton``: the module of its Triton kernels."""
    functions = {call.OP: "forward", backward_call.OP: "backward"}
    in_triton = lazily(triton, "forward", "backward")
    for backend, kernels in (("native", native), ("eager", eager), ("triton", in_triton)):
        add_kernels(backend, kernels, functions)
    rows = call.DIFFERENTIABLE[0]

    def fake(made: Any) -> Tensor:
        tokens: Tensor = getattr(made, rows)
        return tokens.new_empty(tokens.shape[0], made.out_features)

    return define_differentiable(
        call.OP,
        call,
        backward_call,
        {op: backend_kernel(op, rows) for op in functions},
        fake,
        # Gates keep the router's float32.
        autocast=[field for field in call.DIFFERENTIABLE if field != "gates"],
    )


_hidden = _define(HiddenCall, HiddenBackwardCall, "mpoe_kernels.experts.hidden_triton")
_neurons = _define(NeuronCall, NeuronBackwardCall, "mpoe_kernels.experts.neurons_triton")


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
    right = _blocks("right", right)
    left = _blocks("left", left)
    right_gate = None if right_gate is None else _blocks("right_gate", right_gate)
    index = _check_choices("u", u, "F", gates, top_k_index)
    features = u.shape[1]
    groups = right.shape[1]
    size = right.shape[2]
    if features % size or groups not in (1, features // size):
        raise ValueError(
            f"right must be [E, G', b, b] with b a divisor of F = {features} and G' = 1 or F / b; "
            f"got {describe(right)}"
        )
    if left.shape != right.shape:
        raise ValueError(f"left must be {list(right.shape)} like right; got {describe(left)}")
    if (u_gate is None) != (right_gate is None):
        raise ValueError(
            f"right_gate must be given with u_gate, and only with it; got u_gate "
            f"{_presence(u_gate)} and right_gate {_presence(right_gate)}"
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
        if bias.shape != (right.shape[0], features):
            raise ValueError(
                f"bias must be [E, F] = {[right.shape[0], features]}; got {describe(bias)}"
            )
    check_choice("activation", activation, ACTIVATIONS)
    check_same("u", u, right=right, left=left, bias=bias, u_gate=u_gate, right_gate=right_gate)
    check_device("u", u, gates=gates, top_k_index=index)
    return _hidden(
        u,
        gates,
        index,
        right,
        left,
        bias,
        u_gate,
        right_gate,
        ACTIVATIONS[activation],
        requested_backend(backend),
    )


def neuron_experts(
    x: Tensor,
    gates: Tensor,
    top_k_index: Tensor,
    up: Tensor,
    down: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str,
    gate_up: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``o[t] = sum_k gates[t, k] * act(x[t] up_e^T + bias_e) down_e`` with ``e = top_k_index[t,
    k]``.

    With ``gate_up`` the hidden activation is ``act(x[t] gate_up_e^T + bias_e) * (x[t] up_e^T)``.

    Args:
        x: ``[T, I]``, floating.
        gates: ``[T, K]``, floating, used as given.
        top_k_index: int32 or int64 ``[T, K]``, entries in ``-1..E-1``; -1 = no expert. Out of range
            entries are refused on the CPU. An expert that a token chose twice counts twice.
        up: ``[E, m, I]``: the m neurons of each expert, a row each.
        down: ``[E, m, O]``.
        bias: ``[E, m]``, added before the activation.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"silu"``,
            ``"swish"`` or ``"none"``.
        gate_up: ``[E, m, I]``: what goes through the activation of gated neurons.
        backend: name of a backend, or ``None`` / ``"auto"``.

    Returns:
        ``[T, O]`` in the dtype of ``x``. Differentiable once in every floating argument.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named with
            what was expected.
        BackendError: the named backend cannot run it.
    """
    index = _check_choices("x", x, "I", gates, top_k_index)
    check_tensor("up", up, ("E", "m", "I"))
    experts, neurons, width = up.shape
    if 0 in up.shape or width != x.shape[1]:
        raise ValueError(
            f"up must be [E, m, I] with E, m, I >= 1 and I = {x.shape[1]}; got {describe(up)}"
        )
    check_tensor("down", down, ("E", "m", "O"))
    if down.shape[:2] != up.shape[:2] or down.shape[2] < 1:
        raise ValueError(
            f"down must be [E, m, O] = {[experts, neurons]} and O >= 1; got {describe(down)}"
        )
    if bias is not None and check_tensor("bias", bias, ("E", "m")).shape != up.shape[:2]:
        raise ValueError(f"bias must be [E, m] = {[experts, neurons]}; got {describe(bias)}")
    if gate_up is not None and check_tensor("gate_up", gate_up, ("E", "m", "I")).shape != up.shape:
        raise ValueError(f"gate_up must be {list(up.shape)} like up; got {describe(gate_up)}")
    check_choice("activation", activation, ACTIVATIONS)
    check_same("x", x, up=up, down=down, bias=bias, gate_up=gate_up)
    check_device("x", x, gates=gates, top_k_index=index)
    formula = "gelu_tanh" if activation == "gelu_new" else ACTIVATIONS[activation]
    return _neurons(x, gates, index, up, down, bias, gate_up, formula, requested_backend(backend))


def _check_choices(
    name: str, rows: Tensor, axis: str, gates: Tensor, top_k_index: Tensor
) -> Tensor:
    """Check the tokens' rows, gates and experts; returns the int64 experts."""
    check_floating(name, check_tensor(name, rows, ("T", axis)))
    check_floating("gates", check_tensor("gates", gates, ("T", "K")))
    index = check_index("top_k_index", top_k_index, ("T", "K"))
    if gates.shape[0] != rows.shape[0]:
        raise ValueError(f"gates must be [T, K] with T = {rows.shape[0]}; got {describe(gates)}")
    if index.shape != gates.shape:
        raise ValueError(
            f"top_k_index must be {list(gates.shape)} like gates; got {describe(top_k_index)}"
        )
    return index.long()


def _presence(value: Tensor | None) -> str:
    return "None" if value is None else "a tensor"


def _blocks(name: str, value: Any) -> Tensor:
    """``[E, G', b, b]`` from that or from ``[E, b, b]``."""
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        raise TypeError(f"{name} must be a tensor [E, b, b] or [E, G, b, b]; got {describe(value)}")
    blocks = value if value.dim() == 4 else value[:, None]
    if 0 in blocks.shape or blocks.shape[2] != blocks.shape[3]:
        raise ValueError(f"{name} must be [E, G', b, b] with E, G', b >= 1; got {describe(value)}")
    return blocks
