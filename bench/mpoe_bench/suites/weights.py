"""Temporary weights, measured: how many experts' weights one call of the op holds at once besides its operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from mpoe_bench.choice import chosen_contractions
from mpoe_bench.memory import Memory, peak_memory
from mpoe_bench.section import NOT_HERE, Setup
from mpoe_kernels import BackendError, MPOShape, grouped_mpo_linear, route
from mpoe_kernels.backends.registry import AUTO
from mpoe_kernels.testing.cases import random_blocks, workload_shape

MOST_EXPERTS_ALIVE = 2.0


def _measure(shape: MPOShape, experts: int, backend: str, strategy: str, phase: str, device: str) -> tuple[Memory, int]:
    """Memory of one phase with one token per expert, and the bytes of those tokens' rows going in and out."""
    torch.manual_seed(9)
    training = phase == "backward"
    blocks = random_blocks(shape, experts, torch.float32)
    parts = {k: getattr(blocks, k).detach().to(device).requires_grad_(training) for k in ("left", "central", "right")}
    blocks = replace(blocks, **parts)
    x = torch.randn(experts, shape.in_features, device=device, requires_grad=training)
    grad_y = torch.randn(experts, shape.out_features, device=device)
    routing = route(torch.arange(experts, device=device)[:, None], experts)

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

    rows = experts * (shape.in_features + shape.out_features) * 4
    y = forward()
    if not training:
        return peak_memory(forward, device, resident=True)[0], rows
    leaves = (x, *parts.values())

    def backward() -> object:
        return torch.autograd.grad(y, leaves, grad_y, retain_graph=True)

    backward()
    return peak_memory(backward, device, resident=True)[0], rows


def temporary_weights_section(
    shape_names: Sequence[str], sizes: tuple[int, int], experts: Sequence[int], tokens: int, setup: Setup
) -> dict[str, Any]:
    """Measure the strategies that run on ``tokens`` tokens, on one token per expert, so that rows hardly count.

    A row's ``experts_alive`` is what the call needed beyond its results and those rows, over one expert's float32
    weight.
    """
    rows = []
    for name in shape_names:
        shape = workload_shape(name, *sizes)
        weight = shape.in_features * shape.out_features * 4
        for count in experts:
            for backend in setup.backends:
                setup.log(f"temporary weights of {name}, E={count}, {backend}")
                row: dict[str, Any] = {"name": f"{name} [{backend}]", "kind": "mpoe", "shape": name, "reason": None}
                row |= {"backend": backend, "experts": count, "alive": {}, "memory": {}, "strategies": {}}
                try:
                    chosen = chosen_contractions(shape, count, tokens, torch.float32, True, setup.device, backend)
                    for phase, (found, owner) in chosen.items():
                        memory, moved = _measure(shape, count, owner, found.strategy, phase, setup.device)
                        row["alive"][phase] = max(memory.temporary - moved, 0) / weight
                        row["memory"][phase] = {"temporary": memory.temporary, "rows": moved, **asdict(memory)}
                        row["strategies"][phase] = f"{found.strategy} [{owner}]"
                except BackendError as error:
                    row["reason"] = f"{NOT_HERE}: {error}"
                except Exception as error:  # the others are measured, and the report says how this one failed
                    row["reason"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                rows.append(row)
    title = f"temporary weights, {sizes[0]}x{sizes[1]} float32: experts' weights alive at once, measured"
    case = {"tokens": tokens, "model": sizes[0], "hidden": sizes[1], "limit": MOST_EXPERTS_ALIVE}
    return {"key": "weights", "title": title, "baseline": None, "case": case, "rows": rows}
