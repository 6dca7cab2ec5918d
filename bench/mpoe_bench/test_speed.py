"""Every contender of a suite, checked and timed beside its case's dense layer, by phase."""

from __future__ import annotations

from typing import Any

import pytest

from mpoe_bench.contender import Comparison
from mpoe_bench.plugin import RUN, Run
from mpoe_bench.suites import comparisons_of


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per contender and phase."""
    run = metafunc.config.stash[RUN]
    cases = []
    for each in comparisons_of(run.suite, run.scale, run.device, run.backends):
        phases = [*each.phases, *(["graph"] if run.device == "cuda" and "forward" in each.phases else [])]
        for name, *_ in each.contenders:
            cases += [pytest.param(each, name, phase, id=f"{each.title}-{name}-{phase}") for phase in phases]
    metafunc.parametrize(("comparison", "name", "phase"), cases)


def test_speed(benchmark: Any, bench_run: Run, comparison: Comparison, name: str, phase: str) -> None:
    bench_run.measure(benchmark, comparison, name, phase)
