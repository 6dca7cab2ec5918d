"""Tests of the CUDA kernels, compiled for the CPU and emulated. They need a C++ compiler for
x86-64, but no GPU."""

import os

import pytest

from .emulation import missing, register, unregister

_REASON = "; ".join(missing())


def pytest_collection_modifyitems(items):
    skipped = _REASON and not os.environ.get("MPOE_REQUIRE_ALL")
    for item in (item for item in items if "tests/cuda" in item.path.as_posix()):
        if item.path.name.startswith("test_emul"):
            item.add_marker("emulated")
        if skipped:
            item.add_marker(pytest.mark.skip(reason=_REASON))


@pytest.fixture(scope="module")
def registered():
    """There is a backend ``emulated``."""
    register()
    yield
    unregister()
