"""Temporary weights, measured: how many experts' weights a call of the op holds at once, besides its operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mpoe_bench.cases import random_blocks, workload_shape
from mpoe_bench.choice import EAGER
from mpoe_bench.memory import peak_memory
from mpoe_bench.section import NOT_HERE, Setup, failure_text
from mpoe_kernels import BackendError, MPOShape, grouped_mpo_linear, plan_contraction, route
from mpoe_kernels.backends import AUTO

MOST_EXPERTS_ALIVE = 2.0
MOST_GROWTH = 0.1  # in experts' weights, from the fewest to the most experts, of shapes that rebuild no weight


def _temporary(
    shape: MPOShape, experts: int, per_expert: int, backend: str, strategy: str, phase: str, device: str
) -> int:
    """Bytes that one phase needs beyond its operands and results, with ``per_expert`` tokens for every expert.

    Our own kernels allocate memory directly from the system, so resident memory is measured too. Eager PyTorch uses
    only torch's allocator.
    """
    torch.manual_seed(9)
    training, tokens = phase == "backward", experts * per_expert
    blocks = random_blocks(shape, experts, torch.float32)
    parts = {k: getattr(blocks, k).detach().to(device).requires_grad_(training) for k in ("left", "central", "right")}
    blocks = replace(blocks, **parts)
    x = torch.randn(tokens, shape.in_features, device=device, requires_grad=training)
    grad_y = torch.randn(tokens, shape.out_features, device=device)
    routing = route(torch.arange(tokens, device=device)[:, None] // per_expert, experts)

    def forward() -> torch.Tensor:
        with torch.set_grad_enabled(training):
            return grouped_mpo_linear(
                x,
                blocks,
                routing.expert_offsets,
                row_index=routing.token_of_slot,
                backend=None if backend == AUTO else backend,
                strategy=strategy,
            )

    y = forward()
    resident = backend != EAGER
    if not training:
        return peak_memory(forward, device, resident)[0].temporary
    leaves = (x, *parts.values())

    def backward() -> object:
        return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    backward()
    return peak_memory(backward, device, resident)[0].temporary


def beyond_tokens(one: int, two: int) -> int:
    """Bytes left after subtracting the tokens' share, from measurements with one and two tokens per expert."""
    return min(one, max(2 * one - two, 0))


def temporary_weights_section(
    shape_names: Sequence[str], sizes: tuple[int, int], experts: Sequence[int], tokens: int, setup: Setup
) -> dict[str, Any]:
    """Take the strategies of the fewest FLOPs on ``tokens`` tokens; measure them with one and two tokens per expert.

    A row's ``alive`` is, by phase, what the call needed beyond operands, results and what grows with its tokens,
    divided by the size of one expert's float32 weight.
    """
    rows = []
    for name in shape_names:
        shape = workload_shape(name, *sizes)
        weight = shape.in_features * shape.out_features * 4
        for count in experts:
            plan = plan_contraction(shape, count, tokens, torch.float32, training=True)
            for backend in setup.backends:
                setup.log(f"temporary weights of {name}, E={count}, {backend}")
                row: dict[str, Any] = {"name": f"{name} [{backend}]", "kind": "mpoe", "shape": name, "reason": None}
                row |= {"backend": backend, "experts": count, "alive": {}, "temporary": {}, "strategies": {}}
                try:
                    for phase in plan.phases:
                        how = (backend, phase.strategy, phase.phase)
                        one, two = (_temporary(shape, count, each, *how, setup.device) for each in (1, 2))
                        row["temporary"][phase.phase] = beyond_tokens(one, two)
                        row["alive"][phase.phase] = row["temporary"][phase.phase] / weight
                        row["strategies"][phase.phase] = phase.strategy
                    # The separable strategy applies the shared core to all tokens: no expert's weight ever exists.
                    row["rebuilds"] = any(strategy != "separable" for strategy in row["strategies"].values())
                except BackendError as error:
                    row["reason"] = f"{NOT_HERE}: {error}"
                except Exception as error:  # the others are measured, and the report says how this one failed
                    row["reason"] = failure_text(error)
                rows.append(row)
    title = f"temporary weights, {sizes[0]}x{sizes[1]} float32, in units of one expert's weight, measured"
    case = {"tokens": tokens, "model": sizes[0], "hidden": sizes[1]}
    case |= {"limit": MOST_EXPERTS_ALIVE, "growth": MOST_GROWTH}
    return {"key": "weights", "title": title, "baseline": None, "case": case, "rows": rows}
