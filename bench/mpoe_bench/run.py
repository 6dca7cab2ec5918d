"""Run a suite: everything that `mpoe bench` measures, in a session of pytest, as one JSON-able
dict.

Contenders are checked against float64 first; whatever is wrong is not timed. Each is then timed by
pytest-benchmark in turn with its case's dense layer: ``extra_info`` holds ``x`` (median over rounds
of its time over the dense layer's), ``tokens_per_second``, errors and memory.
"""

import contextlib
import gc
import io
import math
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mpoe_bench.contender import (
    NOT_HERE,
    CaptureError,
    Checked,
    Comparison,
    Named,
    checked,
    failure_text,
    graphed,
)
from mpoe_bench.machine import PHASE_NAMES, backends_to_measure, check_options, describe
from mpoe_bench.suites import SCALES, Plan, judged_of
from mpoe_bench.targets import check_targets

SCHEMA = 2


@dataclass(frozen=True)
class Budget:
    """About how long a function is timed, in seconds; fewest and most rounds; the shortest sample,
    of several calls."""

    seconds: float = 3.0
    fewest: int = 3
    most: int = 21
    sample: float = 0.005

    def plan(self, once: float) -> tuple[int, int]:
        """Rounds, and calls of a function in each, from the seconds of one call; what is very slow
        runs once."""
        calls = max(1, min(2000, math.ceil(self.sample / max(once, 1e-9))))
        fitting = self.seconds / max(calls * once, 1e-9)
        fewest = min(self.fewest, int(3 * fitting))
        most = min(self.most, int(fitting))
        return max(1, fewest, most), calls


BUDGETS = {
    "quick": Budget(1.2, most=15),
    "targets": Budget(2.0, 5, 15),
}
ON_GPU = Budget(0.12, 7, 15, 0.002)
TINY = Budget(0.01, 2, 2, 0)


def device_clock() -> float:
    """Seconds, when everything that a GPU was given is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(eq=False)
class Run:
    """A plugin of pytest: what is measured, and the sections so far, comparisons with a row per
    contender.

    Args:
        suite: one of `SUITES`.
        device: ``cpu`` or ``cuda``.
        threads: torch threads; default: all usable processors.
        scale: ``real``, or ``tiny`` sizes for tests.
        backend: see `mpoe_bench.machine.backends_to_measure`.
        minutes: begin nothing new after this time; what does not fit is left out and named.
        only: contenders whose name contains one of these words, which commas separate, beside the
            dense layer.
        phases: which of `PHASE_NAMES` to time; default: all that a comparison has.
        on_section: receives every section when it is finished.

    Attributes:
        sections: in order, JSON-able: ``key``, ``title``, ``baseline``, ``case``, ``rows``; if the
            capture of a CUDA graph broke off, ``spoilt`` says why nothing more can be measured in
            this process.
        skipped: titles of those that there was no time for, or that came after a broken capture.

    Raises:
        ValueError: see `check_options` and `backends_to_measure`.
    """

    suite: str = "quick"
    device: str = "cpu"
    threads: int | None = None
    scale: str = "real"
    backend: str | None = None
    minutes: float | None = None
    only: str = ""
    phases: Sequence[str] = PHASE_NAMES
    on_section: Callable[[dict], None] = lambda _: None

    def __post_init__(self) -> None:
        suite = self.suite
        self.threads = check_options(suite, self.device, self.threads, self.scale, self.phases)
        self.sizes = SCALES[self.scale]
        self.backends = backends_to_measure(self.backend, suite, self.device)
        self.budget = BUDGETS.get(suite, Budget())
        if self.device == "cuda":
            self.budget = ON_GPU
        if not self.sizes.judged:
            self.budget = TINY
        self.timer = time.perf_counter
        self.deadline = time.monotonic() + 60 * (self.minutes or math.inf)
        self.sections = []
        self.skipped = []
        self._context = None
        self._held = {}  # `Checked`: the baseline, and one more

    @pytest.hookimpl(tryfirst=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        option = config.option
        if self.device == "cuda":
            option.benchmark_timer = f"{__name__}.device_clock"
        option.benchmark_disable_gc = option.benchmark_quiet = True  # one table: ours
        self.timer = pkgutil.resolve_name(str(option.benchmark_timer))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test per contender and phase; and per case, phase and backend whose choice is
        judged."""
        names = ("comparison", "contender", "phase")
        parameters = []
        if "case" in metafunc.fixturenames:
            names = ("backend", "case", "phase")
            judged = judged_of(self.sizes, self.backends) if self.suite == "planner" else []
            for backend, case in judged:
                phases = ("forward", "backward") if case.training else ("forward",)
                for phase in phases:
                    label = f"{case.name}-{backend}-{phase}"
                    parameters.append(pytest.param(backend, case, phase, id=label))
        else:
            for comparison in Plan(self.sizes, self.device, self.backends).of(self.suite):
                for contender, phase in self.timed(comparison):
                    label = f"{comparison.title}-{contender[0]}-{phase}"
                    parameters.append(pytest.param(comparison, contender, phase, id=label))
        metafunc.parametrize(names, parameters)

    def timed(self, comparison: Comparison) -> Iterator[tuple[Named, str]]:
        """Contenders and phases of a comparison; none if there is nobody beside the dense layer."""
        baseline, *others = comparison.contenders
        words = self.only.split(",")
        chosen = [other for other in others if any(word in other[0] for word in words)]
        phases = [phase for phase in comparison.phases if phase in self.phases]
        if self.device == "cuda" and "graph" in self.phases and "forward" in comparison.phases:
            phases.append("graph")
        if chosen:
            yield from product((baseline, *chosen), phases)

    @pytest.fixture
    def bench_run(self) -> "Run":
        """What the tests measure with."""
        return self

    def pytest_sessionfinish(self) -> None:
        self.finish()

    def section(self, title: str, **facts: Any) -> dict:
        """The section of this title, begun if there is none; skips the test if nothing new may
        begin."""
        last = self.sections[-1] if self.sections else {}
        if last.get("title") != title:
            if "spoilt" in last or time.monotonic() > self.deadline:
                if title not in self.skipped:
                    self.skipped.append(title)
                pytest.skip(last.get("spoilt", "the time was up"))
            self.finish()
            gc.collect()
            last = {"title": title, **facts, "rows": []}
            last["began"] = time.monotonic()
            self.sections.append(last)
        return last

    def finish(self) -> None:
        """The last section is complete; its tensors are let go."""
        self._context = None
        self._held = {}
        last = self.sections[-1] if self.sections else {}
        if "began" in last:
            last["seconds"] = time.monotonic() - last.pop("began")
            self.on_section(last)

    def _checked(self, comparison: Comparison, contender: Named) -> Checked:
        """A contender and its row, checked once; the tensors of earlier ones are let go."""
        name, kind, build = contender
        if self._context is None:
            self._context = comparison.context()
        if name not in self._held:
            baseline = comparison.contenders[0][0]
            self._held = {key: value for key, value in self._held.items() if key == baseline}
            if time.monotonic() > self.deadline:
                row = {"name": name, "kind": kind, "reason": f"{NOT_HERE}: the time was up"}
                self._held[name] = None, row
            else:
                self._held[name] = checked(name, kind, build, self._context, self.device)
        return self._held[name]

    def measure(self, benchmark: Any, comparison: Comparison, named: Named, phase: str) -> None:
        """Check a contender and time one phase; skips one that is not here, fails if a result of
        ours is wrong."""
        first = comparison.contenders[0]
        case = dict(comparison.facts)
        section = self.section(comparison.title, key=comparison.key, baseline=first[0], case=case)
        contender, row = self._checked(comparison, named)
        if row not in section["rows"]:
            section["rows"].append(row)
        if contender is None:
            if row["kind"] == "peer" or row["reason"].startswith(NOT_HERE):
                pytest.skip(row["reason"])
            pytest.fail(row["reason"])
        base, of_base = self._checked(comparison, first)
        if base is None:
            pytest.fail(f"the baseline {first[0]!r} cannot be measured: {of_base['reason']}")
        call = "forward" if phase == "graph" else phase
        functions = {"contender": contender.call(call)}
        if contender is not base:
            functions["base"] = base.call(call)
        if None in functions.values():
            pytest.skip(f"it takes no part in {phase}")
        try:
            if phase == "graph":
                functions = {who: graphed(function) for who, function in functions.items()}
        except RuntimeError as error:
            row["graph_reason"] = " ".join(str(error).split())[:200]
            if isinstance(error, CaptureError):
                section["spoilt"] = failure_text(error)
                pytest.fail(section["spoilt"])
            pytest.skip(row["graph_reason"])
        samples = in_turn(benchmark, functions, self.budget, self.timer)
        contender.release()
        base.release()
        benchmark.group = f"{comparison.title}, {phase}"
        benchmark.name = named[0]
        for key in ("errors", "memory", "parameters", "floor"):
            benchmark.extra_info[key] = row.get(key)
        if benchmark.stats is not None:  # None with --benchmark-disable
            ours = samples["contender"]
            row[phase] = facts_of(ours, samples.get("base", ours), case["tokens"])
            for key in ("x", "tokens_per_second"):
                benchmark.extra_info[key] = row[phase][key]

    @property
    def failures(self) -> list[str]:
        """MPO contenders that failed or gave a wrong result; a backend without a kernel is not a
        failure."""
        reasons = []
        for section in self.sections:
            if "spoilt" in section:
                reasons.append(
                    f"{section['title']}: {section['spoilt']}; what was to follow is left out"
                )
            for row in section["rows"]:
                reason = row.get("reason") or NOT_HERE
                if row.get("kind", "mpoe") != "peer" and not reason.startswith(NOT_HERE):
                    reasons.append(f"{row['name']} ({section['title']}): {reason}")
        return reasons

    @property
    def targets(self) -> list[dict]:
        """The targets that were measured; they speak of real sizes."""
        return check_targets(self.sections, self.device) if self.sizes.judged else []


def in_turn(
    benchmark: Any, functions: Mapping[str, Any], budget: Budget, timer: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of a call of every function, round by round in turn, so that drift of the machine
    affects all equally.

    The first is timed by pytest-benchmark, the others just before it. Each is called once more at
    the beginning.
    """
    calls = {}
    samples = {name: [] for name in functions}
    first, *others = functions

    def sample(name: str) -> float:
        start = timer()
        for _ in range(calls.get(name, 1)):
            functions[name]()
        return timer() - start

    rounds = {}
    for name in functions:
        rounds[name], calls[name] = budget.plan(sample(name))

    def before() -> None:
        if benchmark.stats is not None:
            benchmark.stats.iterations = calls[first]  # of what runs as one
        for name in others:
            samples[name].append(sample(name) / calls[name])

    benchmark.pedantic(lambda: sample(first), setup=before, rounds=rounds[first])
    samples[first] = list(benchmark.stats.stats.data) if benchmark.stats is not None else []
    return samples


def facts_of(ours: list[float], theirs: list[float], tokens: int) -> dict:
    """``x``: median over rounds of the ratio to the baseline's time in the same round; low and
    high: percentiles."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [one / max(other, 1e-12) for one, other in pairs]
    low, x, high = np.quantile(ratios, (0.1, 0.5, 0.9)).tolist()
    seconds = median(ours)
    return {
        "seconds": seconds,
        "x": x,
        "low": low,
        "high": high,
        "rounds": len(ours),
        "tokens_per_second": tokens / max(seconds, 1e-12),
    }


def run_suite(suite: str = "quick", **options: Any) -> dict:
    """Measure a suite, in a session of pytest inside this process.

    Args:
        suite, options: of `Run`.

    Returns:
        ``{"schema", "suite", "scale", "backends", "machine", "sections", "skipped", "targets",
        "failures", "seconds"}``, JSON-able; ``skipped`` names the sections that there was no time
        for, or that came after a broken CUDA graph capture, which counts as a failure.

    Raises:
        ValueError: see `Run`; or nothing is left to measure.
        RuntimeError: pytest itself failed.
        KeyboardInterrupt: as the session was.
    """
    run = Run(suite, **options)
    here = Path(__file__).parent
    printed = io.StringIO()
    words = [str(here / "test_bench.py"), f"--rootdir={here}", f"--confcutdir={here}"]
    words += ["-o", "addopts=", "-s", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    machine = describe(run.device, run.threads)
    start = time.perf_counter()
    before = torch.get_num_threads()
    torch.set_num_threads(run.threads)
    try:
        with patch.dict(os.environ), contextlib.redirect_stdout(printed):
            for name in filter(re.compile("PYTEST_").match, list(os.environ)):
                del os.environ[name]
            code = pytest.main(words, plugins=[run])
    finally:
        torch.set_num_threads(before)
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(code)}: {printed.getvalue()[-2000:]}")
    if not run.sections and not run.skipped:
        raise ValueError(
            f"only and phases must leave something to measure; got {run.only!r} and {run.phases}"
        )
    return {
        "schema": SCHEMA,
        "suite": suite,
        "scale": run.scale,
        "backends": list(run.backends),
        "machine": machine,
        "sections": run.sections,
        "skipped": run.skipped,
        "targets": run.targets,
        "failures": run.failures,
        "seconds": time.perf_counter() - start,
    }
