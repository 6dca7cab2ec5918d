"""A contender: something that computes a case's result, checked against float64 before it is timed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.cases import relative_error
from mpoe_bench.memory import peak_memory
from mpoe_kernels import BackendError

NOT_HERE = "not here"  # prefix of the reason why a contender cannot take part
# Results are published, so they must not contain a machine's folder names.
FOLDERS = re.compile(r"(?<![\w.])/[^\s:'\"]*/")
# Allowed error: a multiple of the error of the reference run in the same dtype, with a floor in units of rounding.
ERROR_FACTOR = 3.0
ERROR_UNITS = 16.0
# Where rounding decides whether a pre-activation passes ReLU, one element changes a gradient in float32 by more.
GRADIENT_ERROR = 4e-3
Tensors = Mapping[str, Tensor]


class UnavailableError(RuntimeError):
    """A contender cannot take part here; the report shows the message as the reason."""


def grad_of(leaf: Tensor) -> Tensor:
    """A leaf's gradient; zeros where the backward pass never reached it (an idle expert)."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def gradients_of(leaves: Tensors) -> dict[str, Tensor]:
    """``d<name>`` of every leaf that is trained."""
    return {f"d{name}": grad_of(leaf) for name, leaf in leaves.items() if leaf.requires_grad}


@dataclass(frozen=True)
class Truth:
    """Float64 results by name (``y``, and ``d<name>`` for leaves), and the errors of the same formula in a dtype."""

    values: Tensors
    own_errors: Mapping[str, float]
    dtype: torch.dtype

    @classmethod
    def of(cls, results: Callable[[torch.dtype], Tensors], dtype: torch.dtype) -> Truth:
        """Of something that gives its results in any dtype; it is asked for float64 last."""
        same, exact = ({n: v.detach().cpu() for n, v in results(kind).items()} for kind in (dtype, torch.float64))
        return cls(exact, {name: relative_error(same[name], value) for name, value in exact.items()}, dtype)

    def allowed(self, name: str) -> float:
        """Largest relative L2 error that passes."""
        least = ERROR_UNITS * torch.finfo(self.dtype).eps if name == "y" else GRADIENT_ERROR
        return max(ERROR_FACTOR * self.own_errors[name], least)

    def errors(self, results: Tensors) -> dict[str, float]:
        """Relative L2 error of every result of the right shape."""
        right = {name: value for name, value in results.items() if value.shape == self.values[name].shape}
        return {name: relative_error(value.cpu(), self.values[name]) for name, value in right.items()}

    def faults(self, results: Tensors) -> list[str]:
        """What is wrong, in words; empty when every result is right."""
        found, errors = [], self.errors(results)
        for name, value in results.items():
            if name not in errors:
                found.append(f"{name} is {list(value.shape)} instead of {list(self.values[name].shape)}")
            elif not errors[name] <= self.allowed(name):  # true for NaN
                found.append(f"error of {name} is {errors[name]:.1e}, allowed {self.allowed(name):.1e}")
        return found


@dataclass
class Contender:
    """Something to measure.

    Attributes:
        function: the differentiable computation.
        grad_y: gradient of the result for the backward pass; ``None`` = forward only.
        leaves: tensors whose gradients the backward pass fills, x included.
        gradients: those that are checked, after a backward pass, by the names of their `Truth`.
        facts: anything the report shows: shape, backend, floor, parameters.
        step: what ``train`` runs instead of forward and backward: a whole optimizer step.
        timed: what is timed as a forward pass, if not `function`, whose result is checked.
    """

    function: Callable[[], Tensor]
    grad_y: Tensor | None = None
    leaves: Sequence[Tensor] = ()
    gradients: Callable[[], Tensors] = dict
    facts: dict[str, Any] = field(default_factory=dict)
    step: Callable[[], Tensor] | None = None
    timed: Callable[[], Tensor] | None = None

    @property
    def trains(self) -> bool:
        return self.step is not None or self.grad_y is not None

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The result, without recording a graph."""
        return self.function()

    @torch.no_grad()
    def timed_forward(self) -> Tensor:
        """What is timed as a forward pass."""
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


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` instead of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


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
        memory["train"], _ = peak_memory(contender.train, device)
        results |= contender.gradients()
    faults, errors = truth.faults(results), truth.errors(results)
    contender.release()
    if faults:
        return {"reason": f"wrong result, not timed: {'; '.join(faults)}", "errors": errors}
    return {"reason": None, "errors": errors, "memory": {phase: value._asdict() for phase, value in memory.items()}}


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
