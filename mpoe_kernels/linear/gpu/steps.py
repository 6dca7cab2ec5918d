"""Grouped MPO linear by launches: the operations around the contraction, and the contraction step by step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from mpoe_kernels.contract import program_of
from mpoe_kernels.contract.program import KEPT, Need
from mpoe_kernels.linear.gpu.products import BlockGradients, Launches, Pass, blocks_of

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
NO_GRADIENTS: Gradients = (None, None, None)


Call = TypeVar("Call", "ForwardCall", "BackwardCall")
# Tensors that the kernels of every backend require to be dense.
DENSE = ("expert_offsets", "bias", "row_index", "slot_of_token", "out_index", "gates", "grad", "h", "saved")


def prepared(call: Call, dense: Collection[str] = DENSE) -> Call:
    """The call with dense tensors, as far as their names are in ``dense``, and rows of x with contiguous columns."""
    changed: dict[str, Any] = {}
    for name in dense:
        tensor = getattr(call, name, None)
        if tensor is not None and not tensor.is_contiguous():
            changed[name] = tensor.contiguous()
    if "x" not in changed and call.x.stride(1) != 1 and call.x.shape[1] != 1:
        changed["x"] = call.x.contiguous()
    return replace(call, **changed) if changed else call


def forward_by_steps(call: ForwardCall, launches: Launches) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`, for a `prepared` call; every product of the program is one launch."""
    x, dims, slots = call.x, call.dims, call.slots
    y = x.new_empty(slots, call.out_features)
    pre = torch.empty_like(y) if call.saves_z else None
    h = x.new_empty(slots * dims.jC, dims.b) if call.saves_h else None
    program = program_of(dims, call.strategy, "forward")
    values = {"x": x, "y": y, **blocks_of(*call.blocks)}
    if h is not None:
        values[KEPT] = h.view(slots, dims.jC * dims.b)
    sizes = (program, dims, call.expert_offsets, slots)
    launches.compute(Pass(*sizes, values, call.row_index, call.bias, call.activation, pre, call.out_index, call.gates))
    return y, x.new_empty(0) if h is None else h, x.new_empty(0) if pre is None else pre


def backward(
    call: BackwardCall,
    launches: Launches,
    gradients: Callable[[BackwardCall, Tensor, Tensor | None], Gradients],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`.

    Args:
        call: of the op, `prepared`.
        launches: of the backend.
        gradients: function of the call, dz and ``dx [N, I]`` (None: not needed), which it writes by slot; returns those
            of the blocks.
    """
    grad, need, offsets = call.grad, call.need_of_plan, call.expert_offsets
    dz, dbias = launches.activation_backward(grad, call.saved, offsets, call.activation, call.need[4])
    dx = grad.new_empty(call.slots, call.in_features) if need[0] else None
    parts = gradients(call, dz, dx) if any(need) else NO_GRADIENTS
    if dx is not None and call.row_index is not None:
        if call.slot_of_token is None:
            dx = launches.sum_rows_by_token(dx, call.row_index, call.x.shape[0])
        else:
            dx = launches.collect_rows(dx, call.slot_of_token)
    results = [grad.new_empty(0) if part is None else part for part in (dx, *parts, dbias)]
    return results[0], results[1], results[2], results[3], results[4]


def gradients_by_steps(call: BackwardCall, launches: Launches, dz: Tensor, dx: Tensor | None, need: Need) -> Gradients:
    """Gradients of the blocks, and ``dx`` if ``need[0]``; every product of the program is one launch."""
    dims, h = call.dims, call.saved_h
    program = program_of(dims, call.strategy, "backward", need, kept=h is not None)
    grads = BlockGradients.begun(launches, program, call.blocks, need[1:])
    values = {"x": call.x, "d y": dz, **blocks_of(*call.blocks), **grads.values()}
    if dx is not None:
        values["d x"] = dx
    if h is not None:
        values[KEPT] = h.view(call.slots, dims.jC * dims.b)
    launches.compute(Pass(program, dims, call.expert_offsets, call.slots, values, call.row_index))
    return grads.results(call.central.dtype)
