"""A tiny run of the quick suite through the command line, shared by the tests that read its
results."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from mpoe.cli.main import main


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Tiny products on two threads spend their time waiting for each other when others use the
    cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run(NamedTuple):
    """What a run left: exit code, what it printed, its folder, its results."""

    code: object
    out: str
    folder: Path
    results: dict[str, Any]


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """``mpoe bench`` inside the test process."""
    folder, printed, code = tmp_path_factory.mktemp("bench") / "quick", io.StringIO(), 0
    with contextlib.redirect_stdout(printed):
        try:
            main(["bench", "--out", str(folder), "--scale", "tiny", "--threads", "1"])
        except SystemExit as exit_info:
            code = exit_info.code or 0
    return Run(code, printed.getvalue(), folder, json.loads((folder / "results.json").read_text()))
