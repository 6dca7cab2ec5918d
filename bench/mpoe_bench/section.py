"""One section of a report: the contenders of a case are checked, their memory is measured, then all are timed."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mpoe_bench.choice import DEFAULT_BACKENDS
from mpoe_bench.contender import Contender, UnavailableError
from mpoe_bench.graphs import CaptureError, graphed
from mpoe_bench.memory import peak_memory
from mpoe_bench.problem import Truth
from mpoe_bench.timing import Budget, Measure, Timing, cpu_measure, interleave
from mpoe_kernels import BackendError

NOT_HERE = "not here"  # prefix of the reason why a contender cannot take part
# Results are published, so they must not contain a machine's folder names.
FOLDERS = re.compile(r"(?<![\w.])/[^\s:'\"]*/")
Build = Callable[[], tuple[Contender, Truth]]


@dataclass(frozen=True)
class Setup:
    """How a run measures.

    Attributes:
        budget: seconds and rounds per function.
        measure: returns the seconds of a sample.
        device: ``"cpu"`` or ``"cuda"``.
        log: receives one line per contender.
        backends: backends whose MPO contenders take part, see `mpoe_bench.choice.backends_to_measure`.
        deadline: as `time.monotonic` counts; contenders not built by then are left out.
    """

    budget: Budget = field(default_factory=Budget)
    measure: Measure = field(default_factory=cpu_measure)
    device: str = "cpu"
    log: Callable[[str], None] = lambda _: None
    backends: tuple[str, ...] = DEFAULT_BACKENDS
    deadline: float = math.inf

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


def timing_facts(timing: Timing, tokens: int | None = None) -> dict[str, Any]:
    """A `Timing` as stored in the results file; NaN becomes None, as JSON has no NaN."""
    facts = {key: None if math.isnan(value) else value for key, value in asdict(timing).items()}
    if tokens is not None:
        facts["tokens_per_second"] = tokens / timing.seconds
    return facts


def failure_text(error: Exception) -> str:
    """The reason for a failure: type and message on one line, files without their folders."""
    return f"failed: {type(error).__name__}: {FOLDERS.sub('', ' '.join(str(error).split()))[:200]}"


def check_and_weigh(contender: Contender, truth: Truth, setup: Setup) -> dict[str, Any]:
    """Run a contender forward and backward once, to fill its row except for times.

    Returns:
        A row whose ``reason`` is ``None`` if every result agrees with the truth, else what is wrong.
    """
    row: dict[str, Any] = {"name": contender.name, "kind": contender.kind, "reason": None, **contender.facts}
    memory, results = {}, {}
    memory["forward"], results["y"] = peak_memory(contender.forward, setup.device)
    if contender.trains:
        if contender.step is not None:
            contender.step()  # the first step creates the optimizer's state
            contender.release()
        memory["train"], _ = peak_memory(contender.train, setup.device, contender.resident)
        results |= contender.gradients()
    faults = truth.faults(results)
    row["errors"] = truth.errors({n: v for n, v in results.items() if v.shape == truth.values[n].shape})
    contender.release()
    if faults:
        row["reason"] = f"wrong result, not timed: {'; '.join(faults)}"
    else:
        row["memory"] = {p: {**asdict(value), "temporary": value.temporary} for p, value in memory.items()}
    return row


def join(name: str, kind: str, build: Build, setup: Setup) -> tuple[Contender | None, dict[str, Any]]:
    """Build and check a contender; any failure becomes the row's reason."""
    row: dict[str, Any] = {"name": name, "kind": kind}
    if setup.late:
        return None, {**row, "reason": f"{NOT_HERE}: the time was up"}
    setup.log(f"checking {name}")
    try:
        contender, truth = build()
        row |= contender.facts
        row = {**check_and_weigh(contender, truth, setup), "name": name, "kind": kind}
    except (UnavailableError, BackendError) as error:
        return None, {**row, "reason": f"{NOT_HERE}: {error}"}
    except Exception as error:  # any failure: the others are still measured, and the report states the reason
        return None, {**row, "reason": failure_text(error)}
    return (contender if row["reason"] is None else None), row


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a section measures.

    Attributes:
        key, title: the section's names in the results and in the report.
        contenders: (name, kind, builder); a builder raises `UnavailableError` with its reason.
        baseline: name of the contender by whose time the others' are divided.
        tokens: per call, for tokens per second.
        facts: JSON-able description of the case.
        phases: which of ``forward`` and ``train`` (forward + backward) to time.
    """

    key: str
    title: str
    contenders: Sequence[tuple[str, str, Build]]
    baseline: str | None
    tokens: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    phases: Sequence[str] = ("forward", "train")


@dataclass(frozen=True)
class Later:
    """A section of a comparison whose tensors are made when it runs."""

    setup: Setup
    make: Callable[[], Comparison]

    def __call__(self) -> dict[str, Any]:
        return run_section(self.make(), self.setup)


def run_section(comparison: Comparison, setup: Setup) -> dict[str, Any]:
    """Check, weigh and time contenders.

    Returns:
        JSON-able section with one row per contender. If a CUDA graph capture broke off, ``spoilt`` says why nothing
        more can be measured in this process.

    Raises:
        RuntimeError: the baseline itself cannot run or gives a wrong result.
    """
    joined: dict[str, Contender] = {}
    rows: dict[str, dict[str, Any]] = {}
    baseline, title = comparison.baseline, comparison.title
    for name, kind, build in comparison.contenders:
        contender, rows[name] = join(name, kind, build, setup)
        if contender is not None:
            joined[name] = contender
    if baseline is not None and baseline not in joined:
        raise RuntimeError(f"{title}: the baseline {baseline!r} cannot be measured: {rows[baseline]['reason']}")
    for phase in comparison.phases:
        # Masking the central gradient changes nothing in a forward pass.
        takes_part = {"forward": lambda c: not c.facts.get("masked"), "train": lambda c: c.trains}[phase]
        functions = {n: c.timed_forward if phase == "forward" else c.train for n, c in joined.items() if takes_part(c)}
        if not functions or (baseline is not None and baseline not in functions):
            continue
        setup.log(f"timing {phase} of {len(functions)} contenders")
        for name, timing in interleave(functions, baseline, setup.budget, setup.measure).items():
            rows[name][phase] = timing_facts(timing, comparison.tokens)
        for contender in joined.values():
            contender.release()
    section = {"key": comparison.key, "title": title, "baseline": baseline, "case": dict(comparison.facts)}
    if setup.device == "cuda" and "forward" in comparison.phases:
        try:
            _time_graphs(joined, rows, baseline, setup)
        except CaptureError as error:
            section["spoilt"] = failure_text(error)
    return {**section, "rows": list(rows.values())}


def _time_graphs(
    joined: dict[str, Contender], rows: dict[str, dict[str, Any]], baseline: str | None, setup: Setup
) -> None:
    """Time the forward passes again as CUDA graphs, where they can be captured.

    Raises:
        CaptureError: a capture broke off.
    """
    captured = {}
    for name, contender in joined.items():
        try:
            captured[name] = graphed(contender.forward)
        except RuntimeError as error:
            rows[name]["graph_reason"] = " ".join(str(error).split())[:200]
            if isinstance(error, CaptureError):
                raise
    if captured and (baseline is None or baseline in captured):
        for name, timing in interleave(captured, baseline, setup.budget, setup.measure).items():
            rows[name]["graph"] = timing_facts(timing)
