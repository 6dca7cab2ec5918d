"""`hidden_experts`: schema, fake, autograd, autocast, kernels and the public function.

A feed-forward network is ``act(x C1) C2``. Experts that own blocks only on the hidden side have the weights ``C1 (1_G
(x) R_e)`` and ``(1_G (x) L_e) C2``: both dense products run once per token, whatever the number of experts, and this op
computes the part between them. Forward saves its inputs; backward recomputes the hidden activations from ``u``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpoe_kernels.backends import add_kernels, lazily, requested_backend
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
from mpoe_kernels.hidden_experts import eager, native
from mpoe_kernels.hidden_experts.call import HiddenBackwardCall, HiddenCall
from mpoe_kernels.hidden_experts.cuda import HiddenKernels

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
# Positions of the inputs that have gradients, in the order of the backward op's results.
DIFFERENTIABLE = (0, 1, 3, 4, 5, 6, 7)


KERNELS = {
    "native": native,
    "eager": eager,
    "triton": lazily("mpoe_kernels.hidden_experts.triton", "forward", "backward"),
    "cuda": HiddenKernels(CUDA_OPS),
}


def register(backend: str, kernels: Any) -> None:
    """Register a backend's kernels of the op: the functions ``forward`` and ``backward``, and ``reasons`` if it has
    any."""
    table = {"hidden_experts": kernels.forward, "hidden_experts_backward": kernels.backward}
    add_kernels(backend, table, getattr(kernels, "reasons", None))


for _backend, _kernels in KERNELS.items():
    register(_backend, _kernels)


def _run(call: HiddenCall) -> Tensor:
    return run_kernel("hidden_experts", call, call.u, block=call.block)


def _run_backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    return run_kernel("hidden_experts_backward", call, call.u, block=call.block)


def _fake(call: HiddenCall) -> Tensor:
    return call.u.new_empty(call.u.shape)


def _backward_fake(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    return tuple(
        value.new_empty(value.shape) if wants and value is not None else call.u.new_empty(0)
        for value, wants in zip(call.differentiable, call.wanted, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.activation, ctx.backend = inputs[8:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = [bool(ctx.needs_input_grad[position]) for position in DIFFERENTIABLE]
    grads = _backward(*ctx.saved_tensors, ctx.activation, ctx.backend, grad.contiguous(), need)
    found = {p: g for p, g, wanted in zip(DIFFERENTIABLE, grads, need, strict=True) if wanted}
    return tuple(found.get(position) for position in range(10))


_backward = define_op("hidden_experts_backward", HiddenBackwardCall, 7, _run_backward, _backward_fake)
_forward = define_op(
    "hidden_experts",
    HiddenCall,
    1,
    _run,
    _fake,
    setup_context=_setup,
    backward=_autograd,
    autocast=("u", "right", "left", "bias", "u_gate", "right_gate"),  # gates keep the router's float32
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
    """``o[t, g, :] = sum_k gates[t, k] * act(u[t, g, :] R_e + bias_e) L_e`` with ``e = top_k_index[t, k]``.

    With ``u_gate`` the hidden activation is ``act(u_gate R^gate_e + bias_e) * (u R_e)``. F = G b hidden units form G
    groups of b consecutive ones. Blocks with G' = 1 are shared by the groups: plain MPO cores. With G' = G each group
    has its own: a block-diagonal core.

    Args:
        u: ``[T, F]``, floating: the first dense product, before the activation.
        gates: ``[T, K]``, floating, used as given.
        top_k_index: int32 or int64 ``[T, K]``, entries in ``-1..E-1``; -1 = no expert. Out of range entries are
            refused on the CPU.
        right, left: ``[E, G', b, b]`` or, if shared by the groups, ``[E, b, b]``; both have the same shape.
        bias: ``[E, F]``, one per expert, added before the activation.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_new"``, ``"gelu_pytorch_tanh"``, ``"silu"``, ``"swish"`` or
            ``"none"``.
        u_gate: ``[T, F]``: the dense product of a gated network that goes through the activation.
        right_gate: as ``right``; given with ``u_gate``.
        backend: name of a backend, or ``None`` / ``"auto"``.

    Returns:
        ``[T, F]`` in the dtype of ``u``. Differentiable once in every floating argument.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named with what was expected.
        BackendError: the named backend cannot run it.
    """
    check_floating("u", check_tensor("u", u, ("T", "F")))
    check_floating("gates", check_tensor("gates", gates, ("T", "K")))
    index = check_index("top_k_index", top_k_index, ("T", "K"))
    if gates.shape[0] != u.shape[0]:
        raise ValueError(f"gates must be [T, K] with T = {u.shape[0]}; got {describe(gates)}")
    if index.shape != gates.shape:
        raise ValueError(f"top_k_index must be {list(gates.shape)} like gates; got {describe(top_k_index)}")
    right, left = _blocks("right", right, u.shape[1]), _blocks("left", left, u.shape[1])
    if left.shape != right.shape:
        raise ValueError(f"left must be {list(right.shape)} like right; got {describe(left)}")
    if (u_gate is None) != (right_gate is None):
        raise ValueError(
            f"right_gate must be given with u_gate, and only with it; got u_gate {_given(u_gate)} and right_gate "
            f"{_given(right_gate)}"
        )
    if u_gate is not None and right_gate is not None:
        right_gate = _blocks("right_gate", right_gate, u.shape[1])
        if u_gate.shape != u.shape:
            raise ValueError(f"u_gate must be {list(u.shape)} like u; got {describe(u_gate)}")
        if right_gate.shape != right.shape:
            raise ValueError(f"right_gate must be {list(right.shape)} like right; got {describe(right_gate)}")
    if bias is not None:
        check_tensor("bias", bias, ("E", "F"))
        if bias.shape != (right.shape[0], u.shape[1]):
            raise ValueError(f"bias must be [E, F] = {[right.shape[0], u.shape[1]]}; got {describe(bias)}")
    check_choice("activation", activation, ACTIVATIONS)
    check_same("u", u, right=right, left=left, bias=bias, u_gate=u_gate, right_gate=right_gate)
    check_device("u", u, gates=gates, top_k_index=index)
    return _forward(
        *(u, gates, index.long(), right, left, bias, u_gate, right_gate),
        *(ACTIVATIONS[activation], requested_backend(backend)),
    )


def _given(value: object) -> str:
    return "None" if value is None else "a tensor"


def _blocks(name: str, value: Any, features: int) -> Tensor:
    """``[E, G', b, b]`` with G' = 1 or G = F / b, from that or from ``[E, b, b]``."""
    if not isinstance(value, Tensor) or value.dim() not in (3, 4):
        raise TypeError(f"{name} must be a tensor [E, b, b] or [E, G, b, b]; got {describe(value)}")
    blocks = value if value.dim() == 4 else value[:, None]
    experts, groups, size, columns = blocks.shape
    if experts < 1 or size < 1 or size != columns or features % size or groups not in (1, features // size):
        raise ValueError(
            f"{name} must be [E, G', b, b] with b a divisor of F = {features} and G' = 1 or F / b; "
            f"got {describe(value)}"
        )
    return blocks
