"""Kernels run in Triton's interpreter in a separate process: the flag must be set before Triton is
imported."""

import os

import pytest

from mpoe_kernels.triton.architecture import in_interpreter, triton_reasons

WITH_THE_COMPILER = ["test_ahead_of_time.py", "test_gpu_floors.py", "test_loaded_modules.py"]
collect_ignore_glob = [] if in_interpreter() else ["interpreted/*"]
if in_interpreter() or (triton_reasons() and not os.environ.get("MPOE_REQUIRE_ALL")):
    collect_ignore_glob += WITH_THE_COMPILER


@pytest.fixture
def with_triton(lacks):
    """Skip if Triton is missing (with ``MPOE_REQUIRE_ALL``: fail)."""
    if reasons := triton_reasons():
        lacks("; ".join(reasons))
