"""Calls of the grouped MPO linear on made-up tensors, which `mpoe_kernels.contract.autotune`
times."""

from __future__ import annotations

from typing import Any

import torch

from mpoe_kernels.contract import expected_busy_experts
from mpoe_kernels.contract.autotune import EXAMPLES
from mpoe_kernels.contract.ranking import Problem
from mpoe_kernels.linear.op import BackwardCall, ForwardCall


def _made_up(problem: Problem, experts: int, slots: int) -> dict[str, Any]:
    """Arguments of a `LinearCall` on constants: the slots spread evenly over as many experts as are
    expected to be busy. It draws no random numbers."""
    d = problem.dims
    shapes = (
        (slots, d.in_features),
        (experts, d.iL, d.jL, d.a),
        (d.a, d.iC, d.jC, d.b),
        (experts, d.b, d.iR, d.jR),
    )
    tensors = []
    for shape in shapes:
        tensors.append(torch.full(shape, 0.01, dtype=problem.dtype, device=problem.device))
    busy = expected_busy_experts(experts, slots)
    ends = [slots * min(e, busy) // busy for e in range(experts + 1)]
    return dict(
        zip(("x", "left", "central", "right"), tensors, strict=True),
        expert_offsets=torch.tensor(ends, dtype=torch.int32, device=problem.device),
        bias=None,
        row_index=None,
        in_features=d.in_features,
        out_features=d.out_features,
        activation="none",
        strategy=problem.strategy,
        backend=problem.backend,
    )


def example_forward(problem: Problem, experts: int, slots: int) -> ForwardCall:
    """A forward to time, with other numbers of experts and slots."""
    return ForwardCall(**_made_up(problem, experts, slots), save=problem.keeps)


def example_backward(problem: Problem, experts: int, slots: int) -> BackwardCall:
    """A backward to time."""
    common = _made_up(problem, experts, slots)
    x = common["x"]
    d = problem.dims
    grad = x.new_full((slots, d.out_features), 0.01)
    h = saved = x.new_empty(0)
    if d.is_separable:
        h = x.new_full((slots * d.jC, d.b), 0.01)
    need = [*problem.need, False]
    return BackwardCall(**common, grad=grad, h=h, saved=saved, need=need)


EXAMPLES.update(grouped_mpo_linear=example_forward, grouped_mpo_linear_backward=example_backward)
