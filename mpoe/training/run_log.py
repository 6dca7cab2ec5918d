"""Accumulates a run's statistics between two log calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mpoe.training.loss import LossParts

# Sums or averages a tensor over all processes, as `Accelerator.reduce` does.
Reduce = Callable[[Tensor, str], Tensor]


class RunLog:
    """Task loss, auxiliary loss and expert load since the last `pop`.

    Everything stays on the device until then, without synchronisation.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._load: Tensor | None = None

    def note(self, parts: LossParts, load: Tensor | None, micro_batches: int) -> None:
        """Add one of a step's ``micro_batches``; ``load`` `[layers, E]` counts tokens per expert."""
        self._add("steps", torch.ones((), device=parts.task.device) / micro_batches)
        self._add("task_loss", parts.task.detach() / micro_batches)
        if parts.auxiliary is not None:
            self._add("aux_loss", parts.auxiliary.detach() / micro_batches)
        if load is not None:
            load = load.detach().long()
            self._load = load if self._load is None else self._load + load

    def pop(self, reduce: Reduce | None) -> tuple[dict[str, float], Tensor | None]:
        """Means per step by name, and tokens per expert ``[layers, E]`` (None: no mixture); then resets.

        With ``reduce``, over all processes, which must all call it.
        """
        steps = self._sums.pop("steps", None)
        means = {}
        for name in sorted(self._sums):
            total = self._sums.pop(name)
            if reduce is not None:
                total = reduce(total, "mean")
            means[name] = float(total) / max(float(steps) if steps is not None else 1.0, 1e-9)
        counts, self._load = self._load, None
        if counts is not None and reduce is not None:
            counts = reduce(counts, "sum")
        return means, counts

    def _add(self, name: str, value: Tensor) -> None:
        value = value.float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value


def expert_load_of(outputs: Any) -> Tensor | None:
    """Tokens per expert `[layers, E]` of a model's outputs; None for a dense model."""
    return outputs.get("expert_load") if isinstance(outputs, Mapping) else None
