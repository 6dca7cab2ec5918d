"""Work in a forked process that has torch imported already, so that a run to be killed costs seconds, not minutes."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_VERSION_3, _DAC_OVERRIDE, _DAC_READ_SEARCH = 0x20080522, 1, 2  # linux/capability.h


@dataclass
class Child:
    """A forked process; what it prints goes to ``log``."""

    pid: int
    log: Path
    status: int | None = None

    def poll(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status is not None

    def wait(self, seconds: float = 600.0) -> int:
        """Exit status, negative for a signal; a child that takes longer is killed."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"process {self.pid} did not end in {seconds} s; see {self.log}")
            time.sleep(0.005)
        assert self.status is not None
        return self.status

    def kill(self) -> None:
        """Kill -9; it may have ended before."""
        if not self.poll():
            os.kill(self.pid, signal.SIGKILL)
            _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)


def fork(work: Callable[[], object], log: Path) -> Child:
    """Run ``work`` in a child process: exit status 0, 1 with a traceback in ``log``, or that of a SystemExit."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, log)
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)  # whatever happens, a child never goes on as its parent


@contextlib.contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond ``size`` bytes: a write then fails, as on a full disk."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def obey_permissions() -> None:
    """Make root obey the permissions of files, as everybody else does, for the rest of this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, words = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    keep = ~(1 << _DAC_OVERRIDE | 1 << _DAC_READ_SEARCH) & 0xFFFFFFFF
    words[0] &= keep  # effective; the two others are permitted and inheritable
    if libc.capset(header, words) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
