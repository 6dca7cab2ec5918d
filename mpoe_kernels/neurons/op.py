"""`neuron_experts`: its arguments, kernels and public function.

Beside a dense feed-forward network, expert e owns m hidden neurons: a token adds the outputs of the
neurons of the experts that it chose. A neuron is one row of ``up``, ``down``, ``bias`` and
``gate_up``: adding, removing and merging neurons are slices. Forward saves its inputs; backward
recomputes the hidden activations.
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
from mpoe_kernels.hidden_experts import ACTIVATIONS
from mpoe_kernels.neurons import eager, native

KERNELS: dict[str, Any] = {
    "native": native,
    "eager": eager,
    "triton": lazily("mpoe_kernels.neurons.triton", "forward", "backward"),
}
FUNCTIONS = {"neuron_experts": "forward", "neuron_experts_backward": "backward"}
for _backend, _kernels in KERNELS.items():
    add_kernels(_backend, _kernels, FUNCTIONS)


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

    DIFFERENTIABLE = ("x", "gates", "up", "down", "bias", "gate_up")


@dataclass
class NeuronBackwardCall(NeuronCall):
    """A backward pass. Its kernel returns gradients in the order of `differentiable`; gradients
    that are not needed are empty.

    Attributes: grad: ``[T, O]``. need: which of the gradients are needed.
    """

    grad: Tensor
    need: list[bool]


def _fake(call: NeuronCall) -> Tensor:
    return call.x.new_empty(call.x.shape[0], call.down.shape[2])


_forward = define_differentiable(
    "neuron_experts",
    NeuronCall,
    NeuronBackwardCall,
    {op: backend_kernel(op, "x") for op in FUNCTIONS},
    _fake,
    autocast=("x", "up", "down", "bias", "gate_up"),  # gates keep the router's float32
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
    check_floating("x", check_tensor("x", x, ("T", "I")))
    check_floating("gates", check_tensor("gates", gates, ("T", "K")))
    index = check_index("top_k_index", top_k_index, ("T", "K"))
    if gates.shape[0] != x.shape[0]:
        raise ValueError(f"gates must be [T, K] with T = {x.shape[0]}; got {describe(gates)}")
    if index.shape != gates.shape:
        raise ValueError(
            f"top_k_index must be {list(gates.shape)} like gates; got {describe(top_k_index)}"
        )
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
    name = ACTIVATIONS[activation]
    return _forward(
        *(x, gates, index.long(), up, down, bias, gate_up),
        *("gelu_tanh" if name == "gelu_new" else name, requested_backend(backend)),
    )
