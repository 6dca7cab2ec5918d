"""Every contender of a suite of `mpoe bench` under pytest-benchmark: `pytest bench --benchmark-only`."""

from __future__ import annotations

import pytest
from conftest import comparisons_of
from mpoe_bench.section import Comparison


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per contender and phase; pytest-benchmark groups them by case and phase."""
    cases = [
        pytest.param(comparison, contender, phase, id=f"{comparison.title}-{contender[0]}-{phase}")
        for comparison in comparisons_of(metafunc.config)
        for phase in comparison.phases
        for contender in comparison.contenders
    ]
    metafunc.parametrize(("comparison", "contender", "phase"), cases)


def test_contender(time_contender, comparison: Comparison, contender: tuple, phase: str) -> None:
    time_contender(comparison, contender, phase)
