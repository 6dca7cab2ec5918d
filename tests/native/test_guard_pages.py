"""The allocator of tools/native_guard.sh, which ends every tensor at a guard page."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.assertions import run_python
from tests.cases import ROOT, named_cases

SCRIPT = ROOT / "tools/native_guard.sh"
CHILD = """
import ctypes
libc, pointer = ctypes.CDLL(None), ctypes.c_void_p()
libc.free.argtypes = [ctypes.c_void_p]
assert libc.posix_memalign(ctypes.byref(pointer), 64, {size}) == 0
start, byte = pointer.value, ctypes.c_ubyte.from_address
assert start % {alignment} == 0 and byte(start).value == byte(start + {size} - 1).value == 0xFF
{access}
"""


@pytest.fixture(scope="session")
def guard(tmp_path_factory):
    """The allocator. The script builds it, and then runs pytest with it, here only for its
    version."""
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    environment = os.environ | {"MPOE_GUARD_LIBRARY": str(library), "PYTHON": sys.executable}
    built = subprocess.run(
        [SCRIPT, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    return library


FREE = "libc.free(start)"


@named_cases(
    "size, alignment, access, status",
    {
        "the last byte": (64, 64, f"byte(start + 63).value = 1; {FREE}", 0),
        "the byte beyond": (64, 64, "byte(start + 64).value", -signal.SIGSEGV),
        # Between the end and the page, as tensors begin at multiples of 64: only `free` detects it.
        "written before the page": (
            65,
            64,
            f"byte(start + 65).value = 1; {FREE}",
            -signal.SIGABRT,
        ),
        "the byte beyond an odd size": (65, 1, "byte(start + 65).value", -signal.SIGSEGV),
        "beyond whole pages": (3 * 4096, 64, "byte(start + 3 * 4096).value", -signal.SIGSEGV),
        "after its free": (64, 64, f"{FREE}; byte(start).value", -signal.SIGSEGV),
    },
)
def test_what_the_allocator_detects(guard, size, alignment, access, status):
    program = CHILD.format(size=size, alignment=alignment, access=access)
    environment = os.environ | {"LD_PRELOAD": str(guard), "MPOE_GUARD_ALIGN": str(alignment)}
    run_python("-c", program, code=status, env=environment)
