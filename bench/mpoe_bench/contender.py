"""A contender: something that computes a case's result, checked against the truth before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class UnavailableError(RuntimeError):
    """A contender cannot take part here; the report shows the message as the reason."""


@dataclass
class Contender:
    """Something to measure.

    Attributes:
        name: as shown in tables.
        kind: ``"limit"`` (what all times are divided by), ``"mpoe"`` or ``"peer"``.
        function: the differentiable computation.
        grad_y: gradient of the result for the backward pass; ``None`` = forward only.
        leaves: tensors whose gradients the backward pass fills, x included.
        gradients: names (see `mpoe_bench.problem.Truth`) and values of the gradients after a backward pass.
        facts: anything the report shows: shape, backend, floor, parameters.
        step: what ``train`` runs instead of forward and backward: a whole optimizer step.
        resident: resident memory counts too, not only what torch's allocator holds.
        timed: what is timed as a forward pass, if not `function`, whose result is checked.
    """

    name: str
    kind: str
    function: Callable[[], Tensor]
    grad_y: Tensor | None = None
    leaves: Sequence[Tensor] = ()
    gradients: Callable[[], Mapping[str, Tensor]] = dict
    facts: dict[str, Any] = field(default_factory=dict)
    step: Callable[[], Tensor] | None = None
    timed: Callable[[], Tensor] | None = None
    resident: bool = False

    @property
    def trains(self) -> bool:
        return self.step is not None or self.grad_y is not None

    def forward(self) -> Tensor:
        """The result, without recording a graph."""
        with torch.no_grad():
            return self.function()

    def timed_forward(self) -> Tensor:
        """What is timed as a forward pass."""
        if self.timed is None:
            return self.forward()
        with torch.no_grad():
            return self.timed()

    def train(self) -> Tensor:
        """Forward and backward; gradients are left in the leaves."""
        if self.step is not None:
            return self.step()
        assert self.grad_y is not None
        self.release()
        y = self.function()
        y.backward(self.grad_y)
        return y.detach()

    def release(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def grad_of(leaf: Tensor) -> Tensor:
    """A leaf's gradient; zeros where the backward pass never reached it (an idle expert)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
