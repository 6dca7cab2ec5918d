"""The compiled CPU kernels of csrc/cpu/hidden_experts.h: float32 and bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from mpoe_kernels.checks import describe
from mpoe_kernels.hidden_experts.call import HiddenBackwardCall, HiddenCall
from mpoe_kernels.native_interface import DTYPES, HiddenArguments, dense, dense_index, dense_like
from mpoe_kernels.native_library import call_native
from mpoe_kernels.registry import Request

# Gradients as the library calls them, in the order of `backward`.
RESULTS = ("du", "dgates", "dright", "dleft", "dbias", "du_gate", "dright_gate")


def reasons(request: Request) -> list[str]:
    """Why the kernels cannot run a request (empty: they can)."""
    if request.dtype in (torch.float32, torch.bfloat16):
        return []
    return [f"it computes hidden_experts in float32 and bfloat16, not in {request.dtype}"]


def _inputs(call: HiddenCall) -> tuple[HiddenArguments, tuple[Tensor | None, ...]]:
    """What both passes are called with, and the tensors behind it, which the caller keeps until the call returns."""
    u, right, right_gate = dense("u", call.u), call.right, call.right_gate
    if u.dim() != 2 or right.dim() != 4:
        raise ValueError(f"u must have 2 axes and right 4; got {describe(u)}, {describe(right)}")
    if (call.u_gate is None) != (right_gate is None):
        raise ValueError("right_gate must be given with u_gate")
    (tokens, features), (experts, groups, block, _) = u.shape, right.shape
    dtype, blocks = u.dtype, (experts, groups, block, block)
    index = dense_index("top_k_index", call.top_k_index, 2)
    if index.shape[0] != tokens or call.gates.shape != index.shape:
        raise ValueError(f"gates and top_k_index must be [T, K] with T = {tokens}; got {describe(call.gates)}")
    kept = (
        u,
        None if call.u_gate is None else dense_like("u_gate", call.u_gate, u.shape, dtype),
        dense("gates", call.gates.float()),
        index,
        dense_like("right", right, blocks, dtype),
        dense_like("left", call.left, blocks, dtype),
        None if right_gate is None else dense_like("right_gate", right_gate, blocks, dtype),
        None if call.bias is None else dense_like("bias", call.bias, (experts, features), dtype),
    )
    arguments = HiddenArguments(
        dtype=DTYPES.get(dtype, str(dtype).encode()),
        activation=call.activation.encode(),
        tokens=tokens,
        features=features,
        block=block,
        experts=experts,
        own_groups=groups,
        top_k=index.shape[1],
    )
    for name, tensor in zip(
        ("u", "u_gate", "gates", "index", "right", "left", "right_gate", "bias"), kept, strict=True
    ):
        setattr(arguments, name, None if tensor is None else tensor.data_ptr())
    return arguments, kept


def forward(call: HiddenCall) -> Tensor:
    """See `hidden_experts`."""
    arguments, _kept = _inputs(call)
    out = call.u.new_empty(call.u.shape)
    arguments.out = out.data_ptr()
    call_native("mpoe_hidden_experts", arguments)
    return out


def backward(call: HiddenBackwardCall) -> tuple[Tensor, ...]:
    """See `HiddenBackwardCall`."""
    u, need = call.u, call.need
    arguments, kept = _inputs(call)
    rows = dense_like("grad", call.grad, u.shape, u.dtype)
    arguments.grad = rows.data_ptr()
    _, own_gate, own_gates, _, *cores, own_bias = kept
    likes = (u, own_gates, cores[0], cores[1], own_bias, own_gate, cores[2])
    results = []
    for name, like, wanted in zip(RESULTS, likes, need, strict=True):
        result = u.new_empty(0) if like is None or not wanted else like.new_empty(like.shape)
        results.append(result)
        if result.numel():
            setattr(arguments, name, result.data_ptr())
    call_native("mpoe_hidden_experts_backward", arguments)
    results[1] = results[1].to(call.gates.dtype if need[1] else u.dtype)
    return tuple(results)
