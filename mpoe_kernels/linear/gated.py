"""Two projections of the same rows, one with an activation, multiplied: the first half of a gated network.

On a GPU this is a separate op, so that a backend can compute both projections together. Elsewhere, and if a backend has
no kernel for pairs or separate projections are cheaper, it is two grouped products and their elementwise product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpoe_kernels.checks import check_choice
from mpoe_kernels.choice import Problem, chosen_for, strategy_together
from mpoe_kernels.define import define_op
from mpoe_kernels.linear.call import ForwardCall, GatedCall
from mpoe_kernels.linear.eager.activation import apply_activation_
from mpoe_kernels.linear.op import ACTIVATIONS, backward_op, check_call, grouped_mpo_linear
from mpoe_kernels.mpo.fold import MPOBlocks
from mpoe_kernels.planner import ALL_GRADIENTS
from mpoe_kernels.registry import Candidate, kernel_of, requested_backend

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _choice(call: ForwardCall) -> tuple[Candidate, ForwardCall]:
    return chosen_for("grouped_mpo_linear", call, ALL_GRADIENTS, call.saves_h)


def _strategy_together(call: GatedCall, alone: Candidate) -> str | None:
    """The strategy for both projections together; None: separately, because their blocks differ in size or that is
    cheaper."""
    gate, x = call.gate, call.x
    if gate.dims != call.up.dims:
        return None
    keeps = gate.saves_h
    strategy = "separable" if keeps else call.strategy
    sizes = (gate.dims, call.num_experts, call.slots, x.dtype, str(x.device))
    return strategy_together(alone, Problem("grouped_mpo_linear", *sizes, keeps=keeps, strategy=strategy))


def _kernel(call: GatedCall) -> Results:
    (first, gate_call), (second, up_call) = _choice(call.gate), _choice(call.up)
    together = kernel_of(first.backend, "gated_mpo_linear")
    if together and first.backend == second.backend and (strategy := _strategy_together(call, first)):
        found: Results = together(replace(call, strategy=strategy))
        return found
    (gate, gate_h, z), (value, h, _) = first.run(gate_call), second.run(up_call)
    y, nothing = gate * value, gate.new_empty(0)
    if not call.save:
        return y, nothing, nothing.clone(), h, gate_h
    return y, z if call.gate.saves_z else gate, value, h, gate_h


def _fake(call: GatedCall) -> Results:
    def kept(part: ForwardCall) -> Tensor:
        central = part.central
        return x.new_empty(part.slots * central.shape[2], central.shape[3]) if part.saves_h else x.new_empty(0)

    x = call.x
    y = x.new_empty(call.slots, call.out_features)
    z, value = (torch.empty_like(y) if call.save else x.new_empty(0) for _ in range(2))
    return y, z, value, kept(call.up), kept(call.gate)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    ctx.settings = inputs[7:12]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *inputs[12:15], inputs[16], *output[1:])


def _autograd(ctx: Any, grad: Tensor | None, *_kept: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 17
    x, left, central, right, offsets, bias, row_index, *gate_blocks, slots, z, value, h, gate_h = ctx.saved_tensors
    *sizes, activation, strategy, backend = ctx.settings
    needs = ctx.needs_input_grad

    def gradients(blocks: list[Tensor], bias: Tensor | None, need: list[bool], *more: Any) -> list[Tensor | None]:
        if not any(need):
            return [None] * 5
        found = backward_op(x, *blocks, offsets, bias, row_index, *sizes, *more, need, slots)
        return [grad if needed else None for grad, needed in zip(found, need, strict=True)]

    factor = apply_activation_(activation, z.clone() if activation == "relu" else z)
    need = [*needs[:4], needs[5]]
    of_up = "none", strategy, backend, (grad * factor).contiguous(), h, z.new_empty(0)
    up_dx, *others, dbias = gradients([left, central, right], bias, need, *of_up)
    of_gate = activation, strategy, backend, (grad * value).contiguous(), gate_h, z
    gate_dx, *gate_others, _ = gradients(gate_blocks, None, [needs[0], *needs[12:15], False], *of_gate)
    dx = None if up_dx is None or gate_dx is None else up_dx + gate_dx  # either both or neither is needed
    found: list[Tensor | None] = [dx, *others, None, dbias, *[None] * 6, *gate_others, None, None]
    return tuple(found)


_op = define_op(
    "gated_mpo_linear",
    GatedCall,
    5,
    _kernel,
    _fake,
    setup_context=_setup,
    backward=_autograd,
    autocast=("x", "left", "central", "right", "bias", "gate_left", "gate_central", "gate_right"),
)


def gated_mpo_linear(
    x: Tensor,
    up: MPOBlocks,
    expert_offsets: Tensor,
    up_bias: Tensor | None = None,
    *,
    gate_proj: MPOBlocks,
    row_index: Tensor | None = None,
    slot_of_token: Tensor | None = None,
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """``y[s] = activation(x[row_index[s]] @ W_gate,e) * (x[row_index[s]] @ W_up,e + up_bias)``, ``[N, F]``.

    Args:
        x, expert_offsets, row_index, slot_of_token, activation, backend: as in `grouped_mpo_linear`.
        up, up_bias: as ``blocks`` and ``bias`` there.
        gate_proj: blocks of the projection with the activation, with the same features.

    Raises:
        TypeError, ValueError, BackendError: as `grouped_mpo_linear`.
    """
    where = {"row_index": row_index, "slot_of_token": slot_of_token, "backend": backend}
    if x.device.type == "cpu" and requested_backend(backend) != "triton":  # of Triton's interpreter
        gate = grouped_mpo_linear(x, gate_proj, expert_offsets, activation=activation, **where)  # type: ignore[arg-type]
        return gate * grouped_mpo_linear(x, up, expert_offsets, up_bias, **where)  # type: ignore[arg-type]
    for blocks, bias in ((gate_proj, None), (up, up_bias)):
        check_call(x, blocks, expert_offsets, bias, row_index, slot_of_token)
    if up.out_features != gate_proj.out_features:
        raise ValueError(f"gate_proj must have {up.out_features} out_features like up; got {gate_proj.out_features}")
    check_choice("activation", activation, ACTIVATIONS)
    tensors = (x, up.left, up.central, up.right, up_bias, gate_proj.left, gate_proj.central, gate_proj.right)
    y, *_ = _op(
        *(x, up.left, up.central, up.right, expert_offsets, up_bias),
        None if row_index is None else row_index.long(),
        *(up.in_features, up.out_features, ACTIVATIONS[activation], "auto", requested_backend(backend)),
        *(gate_proj.left, gate_proj.central, gate_proj.right),
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors),
        None if slot_of_token is None else slot_of_token.long(),
    )
    return y
