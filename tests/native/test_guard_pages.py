"""The allocator that ends every tensor at a guard page: it detects what it should; a slice of the tests run with it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "native_guard.sh"
CHILD = """
import ctypes
libc, pointer = ctypes.CDLL(None), ctypes.c_void_p()
libc.free.argtypes = [ctypes.c_void_p]
assert libc.posix_memalign(ctypes.byref(pointer), 64, {size}) == 0
start, byte = pointer.value, ctypes.c_ubyte.from_address
assert start % {alignment} == 0 and byte(start).value == byte(start + {size} - 1).value == 0xFF
{access}
libc.free(start)
{after}
"""


@pytest.fixture(scope="session")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    environment = os.environ | {"MPOE_GUARD_LIBRARY": str(library), "PYTHON": sys.executable}
    found = subprocess.run([SCRIPT, "--version"], env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    return library


@pytest.mark.parametrize(
    ("size", "alignment", "access", "after", "status"),
    [
        (64, 64, "byte(start + 63).value = 1", "", 0),
        (64, 64, "byte(start + 64).value", "", -signal.SIGSEGV),
        (65, 64, "byte(start + 65).value = 1", "", -signal.SIGABRT),  # within the alignment: detected by free
        (65, 1, "byte(start + 65).value", "", -signal.SIGSEGV),
        (3 * 4096, 64, "byte(start + 3 * 4096).value", "", -signal.SIGSEGV),
        (64, 64, "", "byte(start).value", -signal.SIGSEGV),
    ],
)
def test_what_the_allocator_finds(guard: Path, size: int, alignment: int, access: str, after: str, status: int) -> None:
    program = CHILD.format(size=size, alignment=alignment, access=access, after=after)
    environment = os.environ | {"LD_PRELOAD": str(guard), "MPOE_GUARD_ALIGN": str(alignment)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
