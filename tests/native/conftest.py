"""Tests of the compiled backend skip with its reason where it is not built (``MPOE_REQUIRE_ALL``: fail)."""

from __future__ import annotations

import os

import pytest

from mpoe_kernels import backend_reasons


@pytest.fixture
def native_library() -> None:
    reasons = backend_reasons()["native"]
    if reasons and os.environ.get("MPOE_REQUIRE_ALL"):
        pytest.fail("; ".join(reasons))
    if reasons:
        pytest.skip("; ".join(reasons))
