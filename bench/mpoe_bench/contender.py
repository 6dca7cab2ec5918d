"""A contender: something that computes a case's result, checked against the truth before it is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.memory import peak_memory
from mpoe_bench.problem import Truth
from mpoe_kernels import BackendError

NOT_HERE = "not here"  # prefix of the reason why a contender cannot take part
# Results are published, so they must not contain a machine's folder names.
FOLDERS = re.compile(r"(?<![\w.])/[^\s:'\"]*/")


class UnavailableError(RuntimeError):
    """A contender cannot take part here; the report shows the message as the reason."""


@dataclass
class Contender:
    """Something to measure.

    Attributes:
        function: the differentiable computation.
        grad_y: gradient of the result for the backward pass; ``None`` = forward only.
        leaves: tensors whose gradients the backward pass fills, x included.
        gradients: names (see `mpoe_bench.problem.Truth`) and values of the gradients after a backward pass.
        facts: anything the report shows: shape, backend, floor, parameters.
        step: what ``train`` runs instead of forward and backward: a whole optimizer step.
        resident: resident memory counts too, not only what torch's allocator holds.
        timed: what is timed as a forward pass, if not `function`, whose result is checked.
    """

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
        with torch.no_grad():
            return (self.timed or self.function)()

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

    def call(self, phase: str) -> Callable[[], Tensor] | None:
        """What runs in a phase; masking the central gradient changes nothing in a forward pass."""
        if phase == "train":
            return self.train if self.trains else None
        return None if self.facts.get("masked") else self.timed_forward


Build = Callable[[Any], tuple[Contender, Truth]]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is measured on one case; its tensors are made when the first contender is.

    Attributes:
        key, title: names in the results and in the report.
        context: makes what the contenders share.
        contenders: (name, kind, builder). Kinds are ``limit``, ``mpoe`` and ``peer``; a builder gets the context and
            raises `UnavailableError` with its reason.
        baseline: name of the contender by whose time the others' are divided.
        tokens: per call, for tokens per second.
        facts: JSON-able description of the case.
        phases: which of ``forward`` and ``train`` (forward + backward) to time.
    """

    key: str
    title: str
    context: Callable[[], Any]
    contenders: Sequence[tuple[str, str, Build]]
    baseline: str
    tokens: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    phases: Sequence[str] = ("forward", "train")


def size_facts(parameters: int, dtype: torch.dtype) -> dict[str, Any]:
    """Number of parameters, their bytes, and AdamW's bytes."""
    return {
        "parameters": parameters,
        "weight_bytes": parameters * dtype.itemsize,
        "optimizer_bytes": 8 * parameters,  # two moments in float32
    }


def failure_text(error: Exception) -> str:
    """The reason for a failure: type and message on one line, files without their folders."""
    return f"failed: {type(error).__name__}: {FOLDERS.sub('', ' '.join(str(error).split()))[:200]}"


def check_and_weigh(contender: Contender, truth: Truth, device: str) -> dict[str, Any]:
    """Run a contender forward and backward once, to fill its row except for times.

    Returns:
        A row whose ``reason`` is ``None`` if every result agrees with the truth, else what is wrong.
    """
    memory, results = {}, {}
    memory["forward"], results["y"] = peak_memory(contender.forward, device)
    if contender.trains:
        if contender.step is not None:
            contender.step()  # the first step creates the optimizer's state
            contender.release()
        memory["train"], _ = peak_memory(contender.train, device, contender.resident)
        results |= contender.gradients()
    faults = truth.faults(results)
    errors = truth.errors({n: v for n, v in results.items() if v.shape == truth.values[n].shape})
    contender.release()
    if faults:
        return {"reason": f"wrong result, not timed: {'; '.join(faults)}", "errors": errors}
    weighed = {phase: {**asdict(value), "temporary": value.temporary} for phase, value in memory.items()}
    return {"reason": None, "errors": errors, "memory": weighed}


def checked(
    name: str, kind: str, build: Build, context: Any, device: str = "cpu"
) -> tuple[Contender | None, dict[str, Any]]:
    """Build and check a contender; any failure becomes the row's reason."""
    row: dict[str, Any] = {"name": name, "kind": kind}
    try:
        contender, truth = build(context)
        row |= contender.facts
        row |= check_and_weigh(contender, truth, device)
    except (UnavailableError, BackendError) as error:
        return None, {**row, "reason": f"{NOT_HERE}: {error}"}
    except Exception as error:  # any failure: the others are still measured, and the report states the reason
        return None, {**row, "reason": failure_text(error)}
    return (contender if row["reason"] is None else None), row
