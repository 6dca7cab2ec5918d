"""If the compiled backend is not built, its tests skip and give the reason (with ``MPOE_REQUIRE_ALL``: fail)."""

from __future__ import annotations

import os

import pytest

from mpoe_kernels import backend_reasons


@pytest.fixture(autouse=True)
def _native_library() -> None:
    reasons = backend_reasons()["native"]
    if reasons and os.environ.get("MPOE_REQUIRE_ALL"):
        pytest.fail("; ".join(reasons))
    if reasons:
        pytest.skip("; ".join(reasons))
