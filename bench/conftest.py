"""pytest-benchmark: a contender is checked against float64, then timed in turn with its case's dense layer.

``extra_info`` holds ``x`` (median over rounds of its time over the dense layer's), ``tokens_per_second``, errors and
memory. Whatever is wrong is not timed. At the end, the targets that were measured.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from mpoe_bench.choice import backends_to_measure
from mpoe_bench.contender import Contender
from mpoe_bench.section import NOT_HERE, Comparison, Later, Setup, join
from mpoe_bench.suites import SCALES, SUITES, sections_of
from mpoe_bench.targets import check_targets

FEWEST, MOST, SECONDS = 5, 200, 1.5  # rounds, and about how long they take together
FOUND = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--scale", choices=tuple(SCALES), default="real", help="tiny: sizes for a smoke test")
    parser.addoption("--suite", choices=SUITES, default="quick", help="whose contenders, see `mpoe bench`")
    parser.addoption("--backend", default="auto", help="auto, all, or names separated by commas")


def pytest_configure(config: pytest.Config) -> None:
    """Narrow tables, with the fastest of a group first and the others relative to it."""
    config.stash[FOUND] = {}
    if config.pluginmanager.hasplugin("benchmark"):
        config.option.benchmark_columns, config.option.benchmark_sort = ["median", "iqr", "rounds"], "median"
    if config.getoption("scale") == "tiny":
        torch.set_num_threads(1)


def comparisons_of(config: pytest.Config) -> list[Comparison]:
    """The comparisons of the chosen suite."""
    setup = Setup(backends=backends_to_measure(config.getoption("backend")))
    sections = sections_of(config.getoption("suite"), SCALES[config.getoption("scale")], setup)
    return [section.make() for section in sections if isinstance(section, Later)]


@functools.lru_cache(maxsize=1)
def baseline_of(comparison: Comparison) -> Contender | None:
    """The checked contender by whose time the others' are divided."""
    for name, kind, build in comparison.contenders:
        if name == comparison.baseline:
            contender, row = join(name, kind, build, Setup())
            assert contender is not None, row["reason"]
            return contender
    return None


@pytest.fixture
def time_contender(benchmark: Any, pytestconfig: pytest.Config) -> Callable[[Comparison, tuple, str], None]:
    """Check a contender and time one phase; it is skipped if it cannot take part, and fails untimed if it is wrong."""

    def run(comparison: Comparison, contender: tuple, phase: str) -> None:
        name, kind, build = contender
        joined, row = join(name, kind, build, Setup())
        if row["reason"] is not None and row["reason"].startswith(NOT_HERE):
            pytest.skip(row["reason"])
        assert joined is not None, row["reason"]
        if phase == "train" and not joined.trains:
            pytest.skip("it has no backward pass")
        base = baseline_of(comparison)
        timer = pkgutil.resolve_name(pytestconfig.getoption("benchmark_timer"))
        ours, dense = [c.train if phase == "train" else c.timed_forward for c in (joined, base or joined)]
        dense_seconds: list[float] = []

        def before() -> None:
            start = timer()
            dense()
            dense_seconds.append(timer() - start)

        start = timer()
        ours()
        tiny = pytestconfig.getoption("scale") == "tiny"
        rounds = FEWEST if tiny else max(FEWEST, min(MOST, int(SECONDS / max(timer() - start, 1e-6))))
        benchmark.group, benchmark.name = f"{comparison.title}, {phase}", name
        benchmark.pedantic(ours, setup=before, rounds=rounds, warmup_rounds=1)
        facts = {key: row.get(key) for key in ("errors", "memory", "parameters", "floor")}
        if benchmark.stats is not None:  # None with --benchmark-disable
            own = benchmark.stats.stats.data
            x = median(mine / theirs for mine, theirs in zip(own, dense_seconds[-rounds:], strict=True))
            facts |= {"x": x, "tokens_per_second": (comparison.tokens or 0) / median(own)}
            section = {"key": comparison.key, "title": comparison.title, "case": dict(comparison.facts), "rows": {}}
            found = pytestconfig.stash[FOUND].setdefault(comparison.title, section)
            found["rows"].setdefault(name, row)[phase] = {"x": x}
        benchmark.extra_info.update(facts)
        for each in (joined, base or joined):
            each.release()

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """x dense of everything that was timed, and the targets."""
    sections = [{**each, "rows": list(each["rows"].values())} for each in config.stash[FOUND].values()]
    for section in sections:
        terminalreporter.section(f"x dense: {section['title']}")
        for row in section["rows"]:
            cells = [f"{row[phase]['x']:>7.2f}" if phase in row else f"{'-':>7}" for phase in ("forward", "train")]
            terminalreporter.write_line(f"{row['name']:<60}{''.join(cells)}")
    if config.getoption("scale") == "real" and sections:
        terminalreporter.section("targets")
        for line in check_targets(sections):
            reached = {True: "yes", False: "NO", None: "-"}[line["reached"]]
            found = ", ".join(f"{dtype} {text}" for dtype, text in line["found"].items())
            terminalreporter.write_line(f"{reached:<4}{line['what']} [{line['backend']}]: {line['wanted']}; {found}")
