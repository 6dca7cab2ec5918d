"""Tests of the CUDA kernels: compiled for the CPU and emulated. They need a C++ compiler for x86-64, no GPU."""

from __future__ import annotations

import os
import platform

import pytest
from emulation import cuda_emulate

_REASON = "no C++ compiler was found" if cuda_emulate.compiler() is None else ""
if platform.machine() not in ("x86_64", "AMD64"):
    _REASON = "the emulator switches stacks on x86-64 only"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not _REASON or os.environ.get("MPOE_REQUIRE_ALL"):
        return
    for item in items:
        if "tests/cuda" in item.path.as_posix():
            item.add_marker(pytest.mark.skip(reason=_REASON))
