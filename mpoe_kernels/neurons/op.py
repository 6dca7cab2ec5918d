"""`neuron_experts`: schema, fake, autograd, autocast, kernels and the public function.

Beside a dense feed-forward network, expert e owns m hidden neurons: a token adds the outputs of the neurons of the
experts that it chose. A neuron is one row of ``up``, ``down``, ``bias`` and ``gate_up``: adding, removing and merging
neurons are slices. Forward saves its inputs; backward recomputes the hidden activations.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels.backends import add_kernels, requested_backend
from mpoe_kernels.checks import (
    check_choice,
    check_device,
    check_floating,
    check_index,
    check_same,
    check_tensor,
    describe,
)
from mpoe_kernels.cuda_library import CUDA_OPS
from mpoe_kernels.define import define_op, run_kernel
from mpoe_kernels.hidden_experts import ACTIVATIONS
from mpoe_kernels.neurons import eager, native
from mpoe_kernels.neurons.call import NeuronBackwardCall, NeuronCall
from mpoe_kernels.neurons.cuda import NeuronKernels

# Positions of the inputs that have gradients, in the order of the backward op's results.
DIFFERENTIABLE = (0, 1, 3, 4, 5, 6)

KERNELS = {"native": native, "eager": eager, "cuda": NeuronKernels(CUDA_OPS)}


def register(backend: str, kernels: Any) -> None:
    """Register a backend's kernels of the op: the functions ``forward`` and ``backward``, and ``reasons`` if it has
    any."""
    table = {"neuron_experts": kernels.forward, "neuron_experts_backward": kernels.backward}
    add_kernels(backend, table, getattr(kernels, "reasons", None))


for _backend, _kernels in KERNELS.items():
    register(_backend, _kernels)


def _run(call: NeuronCall) -> Tensor:
    return run_kernel("neuron_experts", call, call.x, neurons=call.up.shape[1])


def _run_backward(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    return run_kernel("neuron_experts_backward", call, call.x, neurons=call.up.shape[1])


def _fake(call: NeuronCall) -> Tensor:
    return call.x.new_empty(call.x.shape[0], call.down.shape[2])


def _backward_fake(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        value.new_empty(value.shape) if wants and value is not None else call.x.new_empty(0)
        for value, wants in zip(call.differentiable, call.wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.activation, ctx.backend = inputs[7:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = [bool(ctx.needs_input_grad[position]) for position in DIFFERENTIABLE]
    grads = _backward(*ctx.saved_tensors, ctx.activation, ctx.backend, grad.contiguous(), need)
    found = {p: g for p, g, wanted in zip(DIFFERENTIABLE, grads, need, strict=True) if wanted}
    return tuple(found.get(position) for position in range(9))


_backward = define_op("neuron_experts_backward", NeuronBackwardCall, 6, _run_backward, _backward_fake)
_forward = define_op(
    "neuron_experts",
    NeuronCall,
    1,
    _run,
    _fake,
    setup_context=_setup,
    backward=_autograd,
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
    """``o[t] = sum_k gates[t, k] * act(x[t] up_e^T + bias_e) down_e`` with ``e = top_k_index[t, k]``.

    With ``gate_up`` the hidden activation is ``act(x[t] gate_up_e^T + bias_e) * (x[t] up_e^T)``.

    Args:
        x: ``[T, I]``, floating.
        gates: ``[T, K]``, floating, used as given.
        top_k_index: int32 or int64 ``[T, K]``, entries in ``-1..E-1``; -1 = no expert. Out of range entries are
            refused on the CPU. An expert that a token chose twice counts twice.
        up: ``[E, m, I]``: the m neurons of each expert, a row each.
        down: ``[E, m, O]``.
        bias: ``[E, m]``, added before the activation.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"silu"``, ``"swish"`` or
            ``"none"``.
        gate_up: ``[E, m, I]``: what goes through the activation of gated neurons.
        backend: name of a backend, or ``None`` / ``"auto"``.

    Returns:
        ``[T, O]`` in the dtype of ``x``. Differentiable once in every floating argument.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named with what was expected.
        BackendError: the named backend cannot run it.
    """
    check_floating("x", check_tensor("x", x, ("T", "I")))
    check_floating("gates", check_tensor("gates", gates, ("T", "K")))
    index = check_index("top_k_index", top_k_index, ("T", "K"))
    if gates.shape[0] != x.shape[0]:
        raise ValueError(f"gates must be [T, K] with T = {x.shape[0]}; got {describe(gates)}")
    if index.shape != gates.shape:
        raise ValueError(f"top_k_index must be {list(gates.shape)} like gates; got {describe(top_k_index)}")
    check_tensor("up", up, ("E", "m", "I"))
    experts, neurons, width = up.shape
    if 0 in up.shape or width != x.shape[1]:
        raise ValueError(f"up must be [E, m, I] with E, m, I >= 1 and I = {x.shape[1]}; got {describe(up)}")
    check_tensor("down", down, ("E", "m", "O"))
    if down.shape[:2] != up.shape[:2] or down.shape[2] < 1:
        raise ValueError(f"down must be [E, m, O] = {[experts, neurons]} and O >= 1; got {describe(down)}")
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
