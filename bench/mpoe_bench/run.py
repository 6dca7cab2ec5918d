"""Run a suite: everything that `mpoe bench` measures, as one JSON-able dict."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mpoe_bench.machine import check_options, describe
from mpoe_bench.plugin import RUN, Run

SCHEMA = 2
# With the default backends, on the CPU; each backend accounts for about its share of the rows.
EXPECTED_MINUTES = {"quick": 5, "planner": 12, "targets": 6, "layers": 12, "models": 30}


def expected_time(suite: str, scale: str = "real") -> str:
    """The duration of a suite, in words."""
    if suite == "gpu" and scale == "real":
        return "the minutes it is given"
    return "seconds" if scale == "tiny" else f"about {EXPECTED_MINUTES[suite]} minutes on two CPU cores"


class _Watch:
    """A plugin that keeps the run of the session that it is in."""

    run: Run

    def __init__(self, on_section: Callable[[dict[str, Any]], None]) -> None:
        self.on_section = on_section

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        self.run = config.stash[RUN]
        self.run.on_section = self.on_section


def run_suite(
    suite: str = "quick",
    device: str = "cpu",
    threads: int | None = None,
    clock: str = "wall",
    scale: str = "real",
    backend: str | None = None,
    minutes: float | None = None,
    on_section: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure a suite, in a session of pytest inside this process.

    Args:
        suite: one of `SUITES`.
        device: ``cpu`` or ``cuda``.
        threads: torch threads; default: all usable processors.
        clock: ``wall``, or ``cpu`` (this process's CPU time, for shared machines).
        scale: ``real``, or ``tiny`` sizes for tests.
        backend: see `mpoe_bench.machine.backends_to_measure`.
        minutes: begin nothing new after this time; default: no limit, or eight for the gpu suite.
        on_section: receives every section when it is finished.

    Returns:
        ``{"schema", "suite", "scale", "backends", "machine", "sections", "skipped", "targets", "failures",
        "seconds"}``, JSON-able; ``skipped`` names the sections that there was no time for, or that came after a
        broken CUDA graph capture, which counts as a failure.

    Raises:
        ValueError: see `check_options`.
        RuntimeError: pytest itself failed.
        KeyboardInterrupt: as the session was.
    """
    threads = check_options(suite, device, threads, clock, scale, backend)
    here = Path(__file__).parent
    words = [str(here / "test_speed.py"), str(here / "test_choice.py"), f"--rootdir={here}", f"--confcutdir={here}"]
    words += ["-o", "addopts=", "-s", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "mpoe_bench.plugin"]
    words += [f"--suite={suite}", f"--device={device}", f"--scale={scale}"]
    words += [f"--backend={backend}"] if backend is not None else []
    words += [f"--minutes={minutes}"] if minutes is not None else []
    words += ["--benchmark-timer=time.process_time"] if clock == "cpu" else []
    machine, start, before = describe(device, threads, clock), time.perf_counter(), torch.get_num_threads()
    watch, said = _Watch(on_section), io.StringIO()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    torch.set_num_threads(threads)
    try:
        with patch.dict(os.environ, clean, clear=True), contextlib.redirect_stdout(said):
            code = pytest.main(words, plugins=[watch])
    finally:
        torch.set_num_threads(before)
    if code == pytest.ExitCode.INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"pytest ended with status {int(code)}: {said.getvalue()[-2000:]}")
    run = watch.run
    return {
        "schema": SCHEMA,
        "suite": suite,
        "scale": scale,
        "backends": list(run.backends),
        "machine": machine,
        "sections": run.sections,
        "skipped": run.skipped,
        "targets": run.targets,
        "failures": run.failures,
        "seconds": time.perf_counter() - start,
    }
