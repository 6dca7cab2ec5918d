"""The compiled CPU kernels of csrc/cpu/neurons/neurons.h: float32 and bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mpoe_kernels.backends import Request
from mpoe_kernels.checks import describe
from mpoe_kernels.native_library import (
    NATIVE_LIBRARY,
    address,
    dense,
    dense_index,
    dense_like,
    name_of,
)

if TYPE_CHECKING:
    from mpoe_kernels.neurons.op import NeuronBackwardCall, NeuronCall


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a request (empty: they can)."""
    if request.dtype in (torch.float32, torch.bfloat16):
        return []
    return [f"it computes neuron_experts in float32 and bfloat16, not in {request.dtype}"]


def network(
    x: Tensor, up: Tensor, down: Tensor, bias: Tensor | None, gate_up: Tensor | None
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """T, I, O, m, E, and the dense tensors.

    Raises:
        ValueError: sizes or dtypes that do not fit.
    """
    if x.dim() != 2 or up.dim() != 3 or down.dim() != 3:
        raise ValueError(f"x must have 2 axes, up and down 3; got {describe(x)}, {describe(up)}")
    dtype, (tokens, width), (experts, neurons, _), out_features = (
        x.dtype,
        x.shape,
        up.shape,
        down.shape[2],
    )
    tensors = (
        dense("x", x),
        dense_like("up", up, (experts, neurons, width), dtype),
        dense_like("down", down, (experts, neurons, out_features), dtype),
        None if bias is None else dense_like("bias", bias, (experts, neurons), dtype),
        None
        if gate_up is None
        else dense_like("gate_up", gate_up, (experts, neurons, width), dtype),
    )
    return (tokens, width, out_features, neurons, experts), tensors


def _inputs(call: NeuronCall) -> tuple[tuple[Any, ...], tuple[Tensor | None, ...]]:
    """Arguments of both passes; x, gates, the weights and the index, which the caller must keep
    until the call returns."""
    sizes, (x, *weights) = network(call.x, call.up, call.down, call.bias, call.gate_up)
    index, gates = dense_index("top_k_index", call.top_k_index), dense("gates", call.gates).float()
    memory = [address(each) for each in (x, *weights)]
    names_and_sizes = (name_of(call.x.dtype), call.activation, (*sizes, index.shape[1]))
    return (*names_and_sizes, memory, gates.data_ptr(), index.data_ptr()), (
        x,
        gates,
        *weights,
        index,
    )


def forward(call: NeuronCall) -> Tensor:
    """See `neuron_experts`."""
    arguments, _kept = _inputs(call)
    out = call.x.new_empty(call.x.shape[0], call.down.shape[2])
    NATIVE_LIBRARY.functions.neuron_experts(*arguments, out.data_ptr())
    return out


def backward(call: NeuronBackwardCall) -> tuple[Tensor, ...]:
    """See `NeuronBackwardCall`."""
    arguments, (*inputs, _index) = _inputs(call)
    grad = dense("grad", call.grad)
    results = [
        call.x.new_empty(0) if like is None or not wanted else torch.empty_like(like)
        for like, wanted in zip(inputs, call.need, strict=True)
    ]
    NATIVE_LIBRARY.functions.neuron_experts_backward(
        *arguments, grad.data_ptr(), [result.data_ptr() for result in results]
    )
    results[1] = results[1].to(call.gates.dtype)
    return tuple(results)
