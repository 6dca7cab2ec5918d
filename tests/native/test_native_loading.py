"""The native library as a file, and whose threads it uses."""

import os
import shutil
import sys

import pytest

from mpoe_kernels.compiled import load_library
from mpoe_kernels.native_library import INFO_KEYS, LIBRARY, NATIVE_LIBRARY, REASON_FILE, _opened
from tests.assertions import run_python
from tests.cases import ROOT


@pytest.fixture
def library(tmp_path):
    """A copy of the library: the file that is in use must not change."""
    return shutil.copy(NATIVE_LIBRARY.path, tmp_path / LIBRARY)


def load(path, info_keys=INFO_KEYS, bindings=None):
    return load_library(path, _opened, REASON_FILE, info_keys, bindings)


def why_not(path, **options):
    """The one reason why a library is not loaded."""
    (reason,) = load(path, **options).reasons
    return reason


def test_a_second_copy_loads(library):
    assert load(library).info == NATIVE_LIBRARY.info


def test_a_library_of_another_version(library, monkeypatch):
    monkeypatch.setattr("mpoe_kernels.version.__version__", "9.9")
    built = NATIVE_LIBRARY.info["version"]
    assert f"was built for mpoe {built}, this is mpoe 9.9: build again" in why_not(library)


# The reason of the next two. So each of them first loads the copy, and then changes one thing.
OLDER = "was built for an older state of the sources"


def test_a_description_that_lacks_a_key(library):
    assert load(library).reasons == ()
    assert OLDER in why_not(library, info_keys={*INFO_KEYS, "no such key"})


def test_sources_that_changed_since_the_build(library, tmp_path):
    bindings = shutil.copytree(ROOT / "csrc/bindings", tmp_path / "bindings")
    assert load(library, bindings=bindings).reasons == ()
    with (bindings / "module.cpp").open("a") as source:
        source.write("// changed")
    assert OLDER in why_not(library, bindings=bindings)


def test_a_damaged_library(tmp_path):
    path = tmp_path / LIBRARY
    path.write_bytes(b"damaged")
    assert f"{path} does not load on " in why_not(path)


def test_a_library_that_is_absent(tmp_path):
    assert f"{LIBRARY} is not in {tmp_path}" in why_not(tmp_path / LIBRARY)


# ------------------------------------------------------------------ threads


THREADS = """
import os, torch
from mpoe_kernels import MPOShape, grouped_mpo_linear, route
from mpoe_bench.cases import random_blocks

def threads():
    return len(os.listdir("/proc/self/task"))

def runtimes():
    words = open("/proc/self/maps").read().split()
    names = ("libgomp", "libomp", "libiomp")
    return {word for word in words if any(name in word for name in names)}

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
for strategy, values in results.items():
    assert all(torch.equal(values[0], value) for value in values), strategy
print(alone, pool, len(before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_one_pool_of_threads_and_one_openmp():
    """No threads and no OpenMP runtime besides torch's; torch.set_num_threads is respected and
    changes no bit."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    alone, pool, runtimes = map(int, run_python("-c", THREADS, env=environment).split())
    assert pool == alone + 1, "torch's sum started the second thread"
    assert runtimes >= 1
