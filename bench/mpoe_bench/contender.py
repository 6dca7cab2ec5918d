"""A contender: something that computes a case's result, checked against float64 before it is timed,
and its memory."""

import ctypes
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe_bench.cases import relative_error
from mpoe_kernels import BackendError

NOT_HERE = "not here"  # prefix of the reason why a contender cannot take part
# Results are published, so they must not contain a machine's folder names.
FOLDERS = re.compile(r"(?<![\w.])/[^\s:'\"]*/")
# Allowed error: a multiple of the error of the reference run in the same dtype, with a floor in
# units of rounding.
ERROR_FACTOR = 3.0
ERROR_UNITS = 16.0
# Where rounding decides whether a pre-activation passes ReLU, one element changes a gradient in
# float32 by more.
GRADIENT_ERROR = 4e-3
Tensors = Mapping[str, Tensor]


class CaptureError(RuntimeError):
    """A capture failed after it had begun.

    PyTorch then leaves the device's random generator and allocator capturing: anything that the
    process does with them from then on fails.
    """


def gradients_of(leaves: Tensors) -> dict[str, Tensor]:
    """``d<name>`` of every leaf that is trained; zeros where the backward pass never reached it (an
    idle expert)."""
    gradients = {}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            gradients[f"d{name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return gradients


@dataclass(frozen=True)
class Truth:
    """Float64 results by name (``y``, and ``d<name>`` for leaves), and the errors of the same
    formula in a dtype."""

    values: Tensors
    own_errors: Mapping[str, float]
    dtype: torch.dtype

    @classmethod
    def of(cls, results: Callable[[torch.dtype], Tensors], dtype: torch.dtype) -> "Truth":
        """Of something that gives its results in any dtype; it is asked for float64 last."""
        same = results(dtype)
        exact = results(torch.float64)
        errors = {name: relative_error(same[name], value) for name, value in exact.items()}
        return cls({name: value.detach().cpu() for name, value in exact.items()}, errors, dtype)

    def compare(self, results: Tensors) -> tuple[dict[str, float], list[str]]:
        """Relative L2 error of every result of the right shape; and what is wrong, in words."""
        errors = {}
        faults = []
        for name, value in results.items():
            wanted = self.values[name]
            if value.shape != wanted.shape:
                faults.append(f"{name} is {list(value.shape)} instead of {list(wanted.shape)}")
                continue
            errors[name] = relative_error(value.cpu(), wanted)
            least = ERROR_UNITS * torch.finfo(self.dtype).eps if name == "y" else GRADIENT_ERROR
            allowed = max(ERROR_FACTOR * self.own_errors[name], least)
            if not errors[name] <= allowed:  # true for NaN
                faults.append(f"error of {name} is {errors[name]:.1e}, allowed {allowed:.1e}")
        return errors, faults


@dataclass
class Contender:
    """Something to measure.

    Attributes:
        function: the differentiable computation, whose result is checked.
        leaves: by name, tensors whose gradients a training pass fills, x included.
        grad_y: gradient of the result for the backward pass, after which the leaves' gradients are
            checked.
        facts: anything the report shows: shape, backend, floor, parameters.
        step: what ``train`` runs instead of forward and backward: a whole optimizer step; nothing
            of it is checked.
        timed: what is timed as a forward pass, if not `function`.
    """

    function: Callable[[], Tensor]
    leaves: Tensors = field(default_factory=dict)
    grad_y: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    step: Callable[[], Tensor] | None = None
    timed: Callable[[], Tensor] | None = None

    def train(self) -> Tensor:
        """Forward and backward; gradients are left in the leaves."""
        if self.step is not None:
            return self.step()
        self.release()
        y = self.function()
        y.backward(self.grad_y)
        return y.detach()

    def release(self) -> None:
        """Drop the gradients."""
        for leaf in self.leaves.values():
            leaf.grad = None

    def call(self, phase: str) -> Callable[[], Tensor] | None:
        """What runs in a phase; masking the central gradient changes nothing in a forward pass."""
        if phase == "train":
            if self.step is None and self.grad_y is None:
                return None
            return self.train
        if self.facts.get("masked"):
            return None
        return torch.no_grad()(self.timed or self.function)


Build = Callable[[Any], tuple[Contender, Truth]]
Named = tuple[str, str, Build]  # name, kind, builder


@dataclass(frozen=True, eq=False)
class Comparison:
    """What is measured on one case; its tensors are made when the first contender is.

    Attributes:
        key, title: names in the results and in the report.
        context: makes what the contenders share.
        contenders: (name, kind, builder), the first of which is the baseline by whose time the
            others' are divided. Kinds are ``limit``, ``mpoe`` and ``peer``; a builder gets the
            context and raises `BackendError` with its reason.
        facts: JSON-able description of the case; ``tokens``: of a call, for tokens per second.
        phases: which of ``forward`` and ``train`` (forward + backward) to time.
    """

    key: str
    title: str
    context: Callable[[], Any]
    contenders: Sequence[Named]
    facts: Mapping[str, Any]
    phases: Sequence[str]


def size_facts(module: torch.nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Number of parameters, and their bytes."""
    count = sum(p.numel() for p in module.parameters())
    return {"parameters": count, "weight_bytes": count * dtype.itemsize}


def failure_text(error: Exception) -> str:
    """The reason for a failure: type and message on one line, files without their folders."""
    return f"failed: {type(error).__name__}: {FOLDERS.sub('', ' '.join(str(error).split()))[:200]}"


Checked = tuple[Contender | None, dict]


def checked(name: str, kind: str, build: Build, context: Any, device: str = "cpu") -> Checked:
    """Build a contender, run it forward and backward once, and fill its row except for times.

    Returns:
        The contender if every result agrees with the truth, and its row, whose ``reason`` else says
        what is wrong.
    """
    row = {"name": name, "kind": kind, "reason": None}
    memory = {}
    results = {}
    try:
        contender, truth = build(context)
        row |= contender.facts
        forward = torch.no_grad()(contender.function)
        forward()  # a first call may time how it computes: not counted
        memory["forward"], results["y"] = peak_memory(forward, device)
        train = contender.call("train")
        if train is not None:
            train()  # may create an optimizer's state
            contender.release()
            memory["train"], _ = peak_memory(train, device, resident=True)
        if contender.grad_y is not None:
            results |= gradients_of(contender.leaves)
        row["errors"], faults = truth.compare(results)
        contender.release()
        if not faults:
            row["memory"] = memory
            return contender, row
        row["reason"] = f"wrong result, not timed: {'; '.join(faults)}"
    except BackendError as error:
        row["reason"] = f"{NOT_HERE}: {error}"
    # Whatever fails: the others are still measured, and the report states the reason.
    except Exception as error:
        row["reason"] = failure_text(error)
    return None, row


def resident_peak(function: Callable[[], object]) -> int | None:
    """Call the function; peak growth of resident memory meanwhile, ``None`` where the system does
    not report it.

    The C library's free memory is returned first, so that the call must fetch every page that it
    uses. Call the function once beforehand; otherwise what it loads or compiles the first time
    counts too.
    """

    def kibibytes(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{field}:\s+(\d+)", status)[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = kibibytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None
    result = function()
    growth = kibibytes("VmHWM") - before
    del result
    return 1024 * max(growth, 0)


def peak_memory(
    function: Callable[[], Any], device: torch.device | str = "cpu", resident: bool = False
) -> tuple[dict[str, int], Any]:
    """Run ``function``; returns bytes on top of what was allocated before, and its result.

    ``peak``: the most that was held at any time: temporaries, saved activations, results,
    gradients; ``kept``: the part still alive when the call returned (its result, gradients).

    On the CPU, every allocation by torch's allocator counts; with ``resident``, what libraries and
    kernels allocate directly from the system too, by the process's resident memory in a second run.
    On CUDA, the caching allocator's counters are read.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = function()
        torch.cuda.synchronize()
        most = torch.cuda.max_memory_allocated()
        now = torch.cuda.memory_allocated()
        return {"peak": most - before, "kept": now - before}, result
    # Otherwise the profiler's library logs to stderr; it reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as record:
            result = function()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    held = [0, *accumulate(event.nbytes() for event in events)]
    peak = max(held)
    if resident:
        peak = max(peak, resident_peak(function) or 0)
    return {"peak": peak, "kept": held[-1]}, result


def graphed(function: Callable[[], object]) -> Callable[[], None]:
    """``function`` captured in a CUDA graph: launch overhead vanishes. Its inputs must keep their
    storage.

    It is called four times before: kernels are compiled, and synchronisation is detected while
    nothing is captured.

    Raises:
        RuntimeError: the function synchronises; nothing was captured.
        CaptureError: it cannot be captured for another reason.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        raise CaptureError(f"the capture of a CUDA graph failed: {error}") from error
    return graph.replay
