"""pytest in a fork of a process that has imported the large libraries, whose import is most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")


def import_first(modules: list[str]) -> None:
    """What every later run finds imported. To be called before the first one, with ``OMP_NUM_THREADS=1`` set: threads
    do not outlive a fork. A module that is not installed is left out."""
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
        folder: to run in.
        environment: all of it; its ``PYTHONPATH`` comes first on the path of modules.
        arguments: of pytest.
        output: file for what is printed; there once the run has started.
        left_out: entries of this process's path of modules that the run must not see.
    """

    def __init__(
        self, folder: Path, environment: dict[str, str], arguments: list[str], output: Path, left_out: list[str]
    ) -> None:
        self._process = _CONTEXT.Process(target=_run, args=(folder, environment, arguments, output, left_out))
        self._process.start()

    def wait(self, seconds: float) -> int | None:
        """Exit status; None where it still runs after so long."""
        self._process.join(seconds)
        return self._process.exitcode

    def end(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError):  # all of it has ended, or it has not come as far as to lead a group
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()
