"""Run a suite: everything that `mpoe bench` measures, as one JSON-able dict."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from mpoe_bench.choice import backends_to_measure
from mpoe_bench.machine import describe, pinned, usable_cores
from mpoe_bench.section import NOT_HERE, Setup
from mpoe_bench.suites import SCALES, SUITES, sections_of
from mpoe_bench.suites.plan import budget_of
from mpoe_bench.targets import check_targets
from mpoe_bench.timing import CLOCKS, cpu_measure, cuda_measure

SCHEMA = 1
DEVICES = ("cpu", "cuda")
# With the default backends, on the CPU; each backend accounts for about its share of the rows.
EXPECTED_MINUTES = {"quick": 5, "full": 180, "planner": 12, "targets": 6, "layers": 12, "models": 20}
# The gpu suite's time; sections that do not fit are left out and named.
GPU_SECONDS = 480.0


def check_options(
    suite: str, device: str, threads: int | None, clock: str, scale: str, backend: str | None = None
) -> int:
    """Refuse options that cannot be run, before any work; returns the number of threads.

    Raises:
        ValueError: names the option, what was expected, and what was given.
    """
    for name, value, known in (
        ("suite", suite, SUITES),
        ("device", device, DEVICES),
        ("clock", clock, tuple(CLOCKS)),
        ("scale", scale, tuple(SCALES)),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu: torch finds no CUDA device here; got 'cuda'")
    if device == "cuda" and suite == "planner":
        raise ValueError("suite must not be planner on cuda: its cases are a CPU's; got 'planner'")
    cores = len(usable_cores())
    if threads is None:  # products of tiny sizes gain nothing from a second thread, and waiting for it costs
        threads = 1 if scale == "tiny" else cores
    if not 1 <= threads <= cores:
        raise ValueError(f"threads must be between 1 and {cores}, the processors usable here; got {threads}")
    if suite == "gpu" and device == "cpu" and scale != "tiny":
        raise ValueError("scale must be tiny for suite gpu on a CPU, where it is a trial run; got 'real'")
    if clock == "cpu" and (threads != 1 or device != "cpu"):
        raise ValueError("clock 'cpu' counts the seconds of all threads together: it needs device cpu and threads 1")
    backends_to_measure(backend, suite)
    return threads


def expected_time(suite: str, scale: str = "real") -> str:
    """The duration of a suite, in words."""
    if suite == "gpu" and scale == "real":
        return "the minutes it is given"
    return "seconds" if scale == "tiny" else f"about {EXPECTED_MINUTES[suite]} minutes on two CPU cores"


def failures(sections: Sequence[Mapping[str, Any]]) -> list[str]:
    """MPO contenders that failed or gave a wrong result; a backend without a kernel is not a failure."""
    found = []
    for section in sections:
        if "spoilt" in section:
            found.append(f"{section['title']}: {section['spoilt']}; what was to follow is left out")
        for row in section["rows"]:
            reasons = [row["reason"]] if row.get("reason") else []
            reasons += [f"{name}: {why}" for name, why in row.get("faults", {}).items()]
            own = row.get("kind", "mpoe") == "mpoe"
            found += [f"{row['name']} ({section['title']}): {r}" for r in reasons if own and not r.startswith(NOT_HERE)]
    return found


def run_suite(
    suite: str = "quick",
    device: str = "cpu",
    threads: int | None = None,
    clock: str = "wall",
    scale: str = "real",
    log: Callable[[str], None] = lambda _: None,
    on_section: Callable[[dict[str, Any]], None] = lambda _: None,
    backend: str | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Measure a suite.

    Args:
        suite: one of `SUITES`.
        device: ``cpu`` or ``cuda``.
        threads: torch threads, pinned; default: all usable processors.
        clock: ``wall``, or ``cpu`` (this process's CPU time, for shared machines).
        scale: ``real``, or ``tiny`` sizes for tests.
        log: receives progress lines.
        on_section: receives every section when it is finished.
        backend: see `mpoe_bench.choice.backends_to_measure`.
        seconds: start nothing new after this time; default: no limit, or `GPU_SECONDS` for the gpu suite.

    Returns:
        ``{"schema", "suite", "scale", "backends", "machine", "sections", "skipped", "targets", "failures",
        "seconds"}``, JSON-able; ``skipped`` names the sections that there was no time for, or that came after a
        broken CUDA graph capture, which counts as a failure.

    Raises:
        ValueError: see `check_options`.
    """
    threads = check_options(suite, device, threads, clock, scale, backend)
    backends = backends_to_measure(backend, suite, device)
    sizes = SCALES[scale]
    if seconds is None:
        seconds = GPU_SECONDS if suite == "gpu" else math.inf
    measure = cuda_measure() if device == "cuda" else cpu_measure(CLOCKS[clock])

    def progress(line: str) -> None:
        log(f"[{len(sections) + 1}/{len(builds)}] {line}")

    setup = Setup(budget_of(suite, sizes), measure, device, progress, backends, time.monotonic() + seconds)
    builds = list(sections_of(suite, sizes, setup))
    start = time.perf_counter()
    sections: list[dict[str, Any]] = []
    skipped: list[str] = []
    gc.freeze()  # objects made by imports stay; collections between sections need not visit them
    machine = describe(device, threads, clock)
    with pinned(threads):
        for number, build in enumerate(builds):
            if setup.late or (sections and "spoilt" in sections[-1]):
                skipped.append(getattr(build, "name", f"section {number + 1}"))
                continue
            gc.collect()  # timing turns it off
            began = time.perf_counter()
            section = build()
            section["seconds"] = time.perf_counter() - began
            sections.append(section)
            on_section(section)
    gc.unfreeze()
    return {
        "schema": SCHEMA,
        "suite": suite,
        "scale": scale,
        "backends": list(backends),
        "machine": machine,
        "sections": sections,
        "skipped": skipped,
        "targets": check_targets(sections, device) if scale == "real" else [],
        "failures": failures(sections),
        "seconds": time.perf_counter() - start,
    }
