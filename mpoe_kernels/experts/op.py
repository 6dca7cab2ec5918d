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
from mpoe_kernels.checks import check_choice
from mpoe_kernels.define import (
    Differentiable,
    define_differentiable,
    requested_backend,
)
from mpoe_kernels.experts import eager, native
from mpoe_kernels.linear.op import ACTIVATIONS as LINEAR_ACTIVATIONS
from mpoe_kernels.signatures import as_index

# Names in Hugging Face configs -> names in the kernels.
ACTIVATIONS = {**LINEAR_ACTIVATIONS, "gelu_new": "gelu_new"}


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
    # The names of what kernels of both forms read, see `Operands`.
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
    def rows(self) -> Tensor:
        """u."""
        return self.u


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

    @property
    def rows(self) -> Tensor:
        """x."""
        return self.x


@dataclass
class NeuronBackwardCall(NeuronCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients
    that are not needed are empty.

    Attributes: grad: ``[T, O]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]

    OP: ClassVar = "neuron_experts_backward"


_TRITON = lazily("mpoe_kernels.experts.triton", "forward", "backward")
# What kernels of both forms take.
ForwardCall = HiddenCall | NeuronCall
BackwardCall = HiddenBackwardCall | NeuronBackwardCall


def _define(call: type[Any], backward_call: type[Any]) -> Any:
    """The op of one form."""
    functions = {call.OP: "forward", backward_call.OP: "backward"}
    add_kernels("native", native, functions)
    add_kernels("eager", eager, functions)
    add_kernels("triton", _TRITON, functions)

    def fake(made: ForwardCall) -> Tensor:
        return made.rows.new_empty(made.rows.shape[0], made.out_features)

    # Gates keep the router's float32.
    autocast = [field for field in call.DIFFERENTIABLE if field != "gates"]
    return define_differentiable(call.OP, call, backward_call, fake, autocast=autocast)


_hidden = _define(HiddenCall, HiddenBackwardCall)
_neurons = _define(NeuronCall, NeuronBackwardCall)


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
    check_choice("activation", activation, ACTIVATIONS)
    return _hidden(
        u,
        gates,
        as_index("top_k_index", top_k_index),
        _by_group(right),
        _by_group(left),
        bias,
        u_gate,
        _by_group(right_gate),
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
    check_choice("activation", activation, ACTIVATIONS)
    formula = LINEAR_ACTIVATIONS[activation]
    index = as_index("top_k_index", top_k_index)
    return _neurons(x, gates, index, up, down, bias, gate_up, formula, requested_backend(backend))


def _by_group(blocks: Any) -> Any:
    """``[E, 1, b, b]`` of blocks ``[E, b, b]`` that groups share."""
    if isinstance(blocks, Tensor) and blocks.dim() == 3:
        return blocks[:, None]
    return blocks
