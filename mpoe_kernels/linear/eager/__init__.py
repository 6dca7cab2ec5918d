"""Grouped MPO linear: strategy, bias and activation around the kernels of the strategies."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate
from mpoe_kernels.contract import Contraction
from mpoe_kernels.indices import check_offsets, check_range
from mpoe_kernels.linear import grouped
from mpoe_kernels.linear.call import BackwardCall, ForwardCall
from mpoe_kernels.linear.eager.activation import Upstream, apply_activation_
from mpoe_kernels.linear.eager.library import Library, library_waits
from mpoe_kernels.linear.eager.rebuild import rebuild_backward, rebuild_forward
from mpoe_kernels.linear.eager.row_products import rows_backward, rows_forward


def candidates(plan: Contraction) -> list[Candidate]:
    """Expert by expert, which needs the offsets on the CPU; on a GPU also by grouped products, which need not."""
    run = linear_forward if plan.phase == "forward" else linear_backward
    found = [Candidate("eager", plan.strategy, plan.strategy, run, waits=True)]
    if plan.device_type != "cuda" or library_waits(plan.device, plan.dtype) or grouped.counting_reasons(plan):
        return found
    run = partial(grouped.forward if plan.phase == "forward" else grouped.backward, grouped=Library())
    return [*found, Candidate("eager", f"{plan.strategy} by grouped GEMMs", plan.strategy, run)]


def linear_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`."""
    x, offsets = call.x, call.expert_offsets.tolist()
    check_offsets(offsets, call.slots)
    if call.row_index is not None:
        check_range("row_index", call.row_index, 0, x.shape[0] - 1)
    h, saved = x.new_empty(0), x.new_empty(0)
    if call.strategy == "rebuild":
        z = rebuild_forward(call, offsets)
    else:
        z, central_step = rows_forward(call, offsets)
        if central_step is not None:
            h = central_step
    last = offsets[-1]
    if call.bias is not None:
        z[:last] += call.bias
    if call.saves_z:
        saved = z
    y = apply_activation_(call.activation, z)
    y[last:] = 0  # the activation of zero need not be zero
    return y.contiguous(), h, saved.contiguous()


def linear_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    offsets = call.expert_offsets.tolist()
    check_offsets(offsets, call.slots)
    if call.row_index is not None:
        check_range("row_index", call.row_index, 0, call.x.shape[0] - 1)
    upstream = Upstream(call.grad, call.activation, call.saved, call.need[4])
    parts: tuple[Tensor | None, ...] = (None,) * 4
    if not any(call.need_of_plan):
        upstream.rows(0, offsets[-1])
    elif call.strategy == "rebuild":
        parts = rebuild_backward(call, upstream, offsets)
    else:
        parts = rows_backward(call, upstream, offsets)
    dbias = None if upstream.bias is None else upstream.bias.to(call.grad.dtype)
    dx = parts[0]
    if dx is not None and call.row_index is not None:
        dx = torch.zeros_like(call.x).index_add_(0, call.row_index, dx)
    empty = call.grad.new_empty(0)
    results = [empty.clone() if part is None else part.contiguous() for part in (dx, *parts[1:], dbias)]
    return results[0], results[1], results[2], results[3], results[4]
