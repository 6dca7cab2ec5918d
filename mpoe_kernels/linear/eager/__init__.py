"""Grouped MPO linear in PyTorch: offsets, bias, activation and their gradients around the products
of a strategy.

`rebuild` makes one expert's weight after the other; the other strategies multiply rows by blocks,
in `rows`, as the program says (`mpoe_kernels.contract.program`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mpoe_kernels.backends import Candidate, lazily
from mpoe_kernels.contract import Contraction
from mpoe_kernels.contract.program import KEPT, backward_program, forward_program, run
from mpoe_kernels.linear.eager.activation import ACTIVATION, ACTIVATION_GRADIENT
from mpoe_kernels.linear.eager.rebuild import rebuild_backward, rebuild_forward
from mpoe_kernels.linear.eager.rows import Pass

if TYPE_CHECKING:
    from mpoe_kernels.linear.op import BackwardCall, ForwardCall, LinearCall

LIBRARY = lazily("mpoe_kernels.linear.eager.library", "forward", "backward", "is_able")
Group = tuple[int, int, int]  # expert, first slot, last slot + 1
BlockGradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None
]  # x by slot, left, central, right


def candidates(plan: Contraction) -> list[Candidate]:
    """Expert by expert, which needs the offsets on the CPU; on a GPU also by grouped products,
    which need not."""
    compute = linear_forward if plan.phase == "forward" else linear_backward
    found = [Candidate("eager", plan.strategy, plan.strategy, compute, waits=True)]
    if plan.device_type == "cuda" and LIBRARY.is_able(plan):
        by_gemms = getattr(LIBRARY, plan.phase)
        found.append(
            Candidate("eager", f"{plan.strategy} by grouped GEMMs", plan.strategy, by_gemms)
        )
    return found


def linear_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, h, z)``, see `ForwardCall`."""
    groups, last = _busy_experts(call)
    if call.strategy == "rebuild":
        z, h = rebuild_forward(call, groups), None
    else:
        z, h = _rows_forward(call, groups)
    if call.bias is not None:
        z[:last] += call.bias
    for rows in (z, h):
        if rows is not None and last < call.slots:
            rows[last * len(rows) // call.slots :] = 0
    y = ACTIVATION[call.activation](z)
    if last < call.slots:
        y[last:] = 0  # the activation of zero need not be zero
    saved = z.contiguous() if call.saves_z else z.new_empty(0)
    return y.contiguous(), z.new_empty(0) if h is None else h, saved


def linear_backward(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``(dx, dleft, dcentral, dright, dbias)``, see `BackwardCall`."""
    groups, last = _busy_experts(call)
    upstream = Upstream(call)
    found: BlockGradients = (None,) * 4
    if not any(call.need_of_plan):
        upstream.rows(0, last)
    else:
        found = (rebuild_backward if call.strategy == "rebuild" else _rows_backward)(
            call, upstream, groups
        )
    dx, dleft, dcentral, dright = found
    idle = sorted(set(range(call.num_experts)) - {expert for expert, _, _ in groups})
    for stacked in (dleft, dright):
        if stacked is not None and idle:  # an index, even an empty one, is copied to a GPU
            stacked[idle] = 0
    if dx is not None:
        dx[last:] = 0
        dx = (
            dx
            if call.row_index is None
            else torch.zeros_like(call.x).index_add_(0, call.row_index, dx)
        )
    dbias = None if upstream.bias is None else upstream.bias.to(call.grad.dtype)
    results = (dx, dleft, dcentral, dright, dbias)
    first, *others = (
        call.grad.new_empty(0) if each is None else each.contiguous() for each in results
    )
    return first, others[0], others[1], others[2], others[3]


def _busy_experts(call: LinearCall) -> tuple[list[Group], int]:
    """The experts that have slots, and the number of filled slots."""
    offsets, slots = call.expert_offsets.tolist(), call.slots
    if offsets[0] != 0 or offsets[-1] > slots or offsets != sorted(offsets):
        raise ValueError(
            f"expert_offsets must start at 0, not fall, and end at {slots} at most; got {offsets}"
        )
    if call.row_index is not None and call.row_index.is_cpu and slots:
        lowest, highest = (int(bound) for bound in call.row_index.aminmax())
        if lowest < 0 or highest >= call.x.shape[0]:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"row_index must lie in 0..{call.x.shape[0] - 1}; got {wrong}")
    ranges = enumerate(zip(offsets, offsets[1:], strict=False))
    return [(expert, start, stop) for expert, (start, stop) in ranges if stop > start], offsets[-1]


def _rows_forward(call: ForwardCall, groups: list[Group]) -> tuple[Tensor, Tensor | None]:
    """``(z [N, F], h)``: pre-activation without bias, and the central step's result ``[N jC, b]``
    if separable is to save it; both are undefined in slots without an expert."""
    x, dims = call.x, call.dims
    program = forward_program(dims, call.strategy)
    whole = Pass(program, call)
    # A separable shape's last rows are padded in memory, so they can be written directly to their
    # place.
    padded = dims.jC * dims.jR if program.strategy == "separable" else dims.out_features
    whole.rows["y"] = x.new_empty(call.slots, padded)
    if call.save and program.strategy == "separable":
        whole.rows[KEPT] = x.new_empty(call.slots, dims.jC * dims.b)
    run(program, whole.chunks(groups))
    h = whole.rows.get(KEPT)
    return whole.rows["y"][:, : dims.out_features], None if h is None else h.view(-1, dims.b)


def _rows_backward(call: BackwardCall, upstream: Upstream, groups: list[Group]) -> BlockGradients:
    """Rows other than h, which the forward of separable saved, are computed again if they are
    read."""
    x, dims, need, h = call.x, call.dims, call.need_of_plan, call.saved_h
    program = backward_program(dims, call.strategy, need, h is not None)
    whole = Pass(program, call, upstream)
    if need[0]:
        whole.rows["d x"] = x.new_empty(call.slots, dims.iL * dims.iC * dims.iR)
    if h is not None:
        whole.rows[KEPT] = h.view(call.slots, dims.jC * dims.b)
    whole.aux = {
        f"d {k}": x.new_empty(whole.blocks[k].shape)
        for k, n in (("L", need[1]), ("R", need[3]))
        if n
    }
    run(program, whole.chunks(groups))
    dx = whole.rows["d x"][:, : dims.in_features] if need[0] else None
    dcentral = None
    if need[2]:
        like = call.central
        dcentral = torch.zeros_like(like) if whole.central is None else whole.central.to(like.dtype)
    return dx, whole.aux.get("d L"), dcentral, whole.aux.get("d R")


class Upstream:
    """The gradient of the pre-activations; the activation's is applied only when rows are
    requested, so they are still in cache when an expert's products read them. Every row must be
    requested exactly once.

    Attributes:
        bias: gradient of the bias, summed over the rows requested so far; None if it is not needed.
    """

    def __init__(self, call: BackwardCall) -> None:
        self._grad, self._activation, self._saved = call.grad, call.activation, call.saved
        dtype = torch.promote_types(call.grad.dtype, torch.float32)
        self.bias = call.grad.new_zeros(call.out_features, dtype=dtype) if call.need[4] else None

    def rows(self, start: int, stop: int) -> Tensor:
        """Those of slots ``start..stop``."""
        saved = self._saved if self._activation == "none" else self._saved[start:stop]
        dz = ACTIVATION_GRADIENT[self._activation](self._grad[start:stop], saved)
        if self.bias is not None:
            self.bias += dz.sum(0)
        return dz
