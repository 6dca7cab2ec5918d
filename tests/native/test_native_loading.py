"""The native library as a file, and whose threads it uses; the allocator that ends every tensor at
a guard page."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from mpoe_kernels import native_library as load
from mpoe_kernels.compiled import load_library
from mpoe_kernels.native_library import NATIVE_LIBRARY
from tests.cases import ROOT


def loaded(path, content):
    """Each in a file of its own: a library that is in use must not change."""
    path.write_bytes(content)
    return load_library(path, load._opened, load.REASON_FILE, load.INFO_KEYS)


def test_a_library_that_cannot_be_used_says_why(tmp_path, monkeypatch):
    content = NATIVE_LIBRARY.path.read_bytes()
    assert (
        loaded(tmp_path / "second.so", content).info == NATIVE_LIBRARY.info
    )  # a second copy does no harm
    monkeypatch.setattr("mpoe_kernels.version.__version__", "9.9")
    (reason,) = loaded(tmp_path / "other.so", content).reasons
    assert (
        f"was built for mpoe {NATIVE_LIBRARY.info['version']}, this is mpoe 9.9: build again"
        in reason
    )
    monkeypatch.undo()
    monkeypatch.setattr(load, "INFO_KEYS", {"no such key"})
    (reason,) = loaded(tmp_path / "older.so", content).reasons
    assert "was built for an older state of the sources" in reason
    bindings = tmp_path / "bindings"
    bindings.mkdir()
    (bindings / "module.cpp").write_text("// changed since the library was built")
    (tmp_path / "stale.so").write_bytes(content)
    (reason,) = load_library(
        tmp_path / "stale.so", load._opened, load.REASON_FILE, load.INFO_KEYS, bindings
    ).reasons
    assert "was built for an older state of the sources" in reason
    path = tmp_path / load.LIBRARY
    (reason,) = loaded(path, b"damaged").reasons
    assert f"{path} does not load on " in reason
    path.unlink()
    (reason,) = load_library(path, load._opened, load.REASON_FILE, load.INFO_KEYS).reasons
    assert f"{load.LIBRARY} is not in {tmp_path}" in reason


THREADS = """
import os, torch
from mpoe_kernels import MPOShape, grouped_mpo_linear, route
from mpoe_bench.cases import random_blocks

def threads():
    return len(os.listdir("/proc/self/task"))

def runtimes():
    lines = open("/proc/self/maps").read().split()
    names = ("libgomp", "libomp", "libiomp")
    return {word for word in lines if any(name in word for name in names)}

torch.set_num_threads(1)
shape = MPOShape((16, 9, 16), (16, 7, 16), max_bond=24)
routing = route(torch.arange(300).remainder(5).view(-1, 1), 5, backend="eager")
x, blocks = torch.randn(300, shape.in_features), random_blocks(shape, 5, torch.float32)
results = {}
def compute(count):
    torch.set_num_threads(count)
    for strategy in ("rebuild", "half_left", "chain"):
        y = grouped_mpo_linear(
            x, blocks, routing.expert_offsets, row_index=routing.token_of_slot,
            backend="native", strategy=strategy)
        results.setdefault(strategy, []).append(y)

before = runtimes()
alone = threads()
compute(1)
assert threads() == alone, "one thread was asked for"
torch.set_num_threads(2)
torch.randn(4000, 4000).sum()  # torch starts its pool
pool = threads()
compute(2)
assert threads() == pool, (threads(), pool)
assert runtimes() == before, runtimes() - before
compute(1)
for values in results.values():
    assert all(torch.equal(values[0], value) for value in values)
print(alone, pool, len(before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_one_pool_of_threads_and_one_openmp():
    """No threads and no OpenMP runtime besides torch's; torch.set_num_threads is respected and
    changes no bit."""
    command = [sys.executable, "-c", THREADS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    alone, pool, runtimes = map(int, done.stdout.split())
    assert pool == alone + 1  # torch's sum started the second thread
    assert runtimes >= 1


# ------------------------------------------------------------------ guard pages


SCRIPT = ROOT / "tools/native_guard.sh"
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
def guard(tmp_path_factory):
    if sys.platform != "linux" or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs Linux and a C++ compiler")
    library = tmp_path_factory.mktemp("guard") / "guard_pages.so"
    environment = os.environ | {"MPOE_GUARD_LIBRARY": str(library), "PYTHON": sys.executable}
    found = subprocess.run(
        [SCRIPT, "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return library


@pytest.mark.parametrize(
    "size, alignment, access, after, status",
    [
        (64, 64, "byte(start + 63).value = 1", "", 0),
        (64, 64, "byte(start + 64).value", "", -signal.SIGSEGV),
        (
            65,
            64,
            "byte(start + 65).value = 1",
            "",
            -signal.SIGABRT,
        ),  # within the alignment: detected by free
        (65, 1, "byte(start + 65).value", "", -signal.SIGSEGV),
        (3 * 4096, 64, "byte(start + 3 * 4096).value", "", -signal.SIGSEGV),
        (64, 64, "", "byte(start).value", -signal.SIGSEGV),
    ],
)
def test_what_the_allocator_finds(guard, size, alignment, access, after, status):
    program = CHILD.format(size=size, alignment=alignment, access=access, after=after)
    environment = os.environ | {"LD_PRELOAD": str(guard), "MPOE_GUARD_ALIGN": str(alignment)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
