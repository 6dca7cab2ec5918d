"""Runs pytest in a fork of a process that has already imported the large libraries: most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")


def import_first(modules: list[str]) -> None:
    """Set which modules every later run finds imported. Call it before the first run and with ``OMP_NUM_THREADS=1``
    set, because threads do not survive a fork. Modules that are not installed are left out."""
    _CONTEXT.set_forkserver_preload(modules)


def _run(folder: Path, environment: dict[str, str], arguments: list[str], output: Path, left_out: list[str]) -> None:
    os.setsid()
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in environment
    own = environment["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = own + [path for path in sys.path if path and path not in left_out]
    import pytest

    sys.exit(int(pytest.main(arguments)))


class ForkedPytest:
    """A run that has been started.

    Args:
        folder: working directory of the run.
        environment: the complete environment; its ``PYTHONPATH`` comes first in ``sys.path``.
        arguments: pytest's arguments.
        output: file for the output; it exists once the run has started.
        left_out: entries of this process's ``sys.path`` that the run must not see.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], arguments: list[str], output: Path, left_out: list[str]
    ) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(folder, environment, arguments, output, left_out))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """Exit status; None if it is still running after that time."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self) -> None:
        """Kill it and everything it started."""
        with suppress(ProcessLookupError):  # everything has ended, or it does not lead a process group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
