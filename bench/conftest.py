"""pytest-benchmark suites: `pytest bench --benchmark-only`. Results that differ from float64 are not timed."""

from __future__ import annotations

import pytest
import torch
from mpoe_bench.choice import backends_to_measure
from mpoe_bench.section import NOT_HERE, Comparison, Setup, join
from mpoe_bench.suites import SCALES, Scale


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=tuple(SCALES), default="real", help="tiny: sizes for a smoke test")
    parser.addoption("--backend", default="auto", help="auto, all, or names separated by commas")


def pytest_configure(config: pytest.Config) -> None:
    """Narrow tables, with the fastest of a group first and the others relative to it; little time for tiny sizes."""
    if not config.pluginmanager.hasplugin("benchmark"):
        return
    options = config.option
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        options.benchmark_columns = ["median", "iqr", "rounds"]
    options.benchmark_sort = "median"
    if config.getoption("scale") == "tiny":
        options.benchmark_max_time, options.benchmark_min_rounds = 0.05, 3
        torch.set_num_threads(1)


def scale_of(config: pytest.Config) -> Scale:
    return SCALES[config.getoption("scale")]


def backends_of(config: pytest.Config) -> tuple[str, ...]:
    return backends_to_measure(config.getoption("backend"))


def parametrize(metafunc: pytest.Metafunc, comparisons: list[Comparison]) -> None:
    """One test per contender and phase; pytest-benchmark groups them by case and phase."""
    cases = [
        pytest.param(comparison, contender, phase, id=f"{comparison.title}-{contender[0]}-{phase}")
        for comparison in comparisons
        for phase in comparison.phases
        for contender in comparison.contenders
    ]
    metafunc.parametrize(("comparison", "contender", "phase"), cases)


@pytest.fixture
def time_contender(benchmark):
    """Check a contender and time one phase; it is skipped if it cannot take part, and fails untimed if it is wrong."""

    def run(comparison: Comparison, contender: tuple, phase: str) -> None:
        name, kind, build = contender
        joined, row = join(name, kind, build, Setup())
        if row["reason"] is not None and row["reason"].startswith(NOT_HERE):
            pytest.skip(row["reason"])
        assert joined is not None, row["reason"]
        if phase == "train" and not joined.trains:
            pytest.skip("it has no backward pass")
        benchmark.group, benchmark.name = f"{comparison.title}, {phase}", name
        benchmark.extra_info.update({key: row.get(key) for key in ("errors", "memory", "parameters", "runs", "floor")})
        benchmark(getattr(joined, phase))
        joined.release()

    return run
