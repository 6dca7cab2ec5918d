"""`pytest bench` takes the options of `mpoe bench` that say what is measured, and ends with its
tables."""

from typing import Any

import pytest
import torch
from mpoe_bench.run import Run
from mpoe_bench.tables import tables_of, text_of

OPTIONS = {"suite": str, "device": str, "backend": str, "scale": str, "minutes": float}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mpoe bench")
    for name, kind in OPTIONS.items():
        group.addoption(f"--{name}", type=kind, default=getattr(Run, name), help="see mpoe bench")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    chosen = {name: config.getoption(name) for name in OPTIONS}
    try:
        config.pluginmanager.register(Run(**chosen), "mpoe bench")
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if chosen["scale"] == "tiny":
        torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.pluginmanager.get_plugin("mpoe bench")
    for table in tables_of(run.sections, run.targets):
        terminalreporter.write_line(text_of(table))
