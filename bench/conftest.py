"""`pytest bench` takes the options of `mpoe bench` that say what is measured, and ends with its
tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mpoe_bench.run import Run
from mpoe_bench.suites import SUITES
from mpoe_bench.tables import tables_of, text_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpoe bench")
    group.addoption("--suite", default="quick", help=", ".join(SUITES))
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption(
        "--backend", default=None, help="auto, all, or names with commas; default: auto and eager"
    )
    group.addoption("--scale", default="real", help="real, or tiny: sizes of a test")
    group.addoption("--minutes", type=float, default=None, help="begin nothing new after so long")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    chosen = {
        name: config.getoption(name) for name in ("suite", "device", "backend", "scale", "minutes")
    }
    try:
        config.pluginmanager.register(Run(**chosen), "mpoe bench")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if chosen["scale"] == "tiny":
        torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run: Any = config.pluginmanager.get_plugin("mpoe bench")
    for table in tables_of(run.sections, run.targets):
        terminalreporter.write_line(text_of(table))
