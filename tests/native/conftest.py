"""If the compiled backend is not built, its tests skip and give the reason (with
``MPOE_REQUIRE_ALL``: fail)."""

import pytest

from mpoe_kernels import backend_reasons


@pytest.fixture(autouse=True)
def _native_library(lacks):
    if reasons := backend_reasons()["native"]:
        lacks("; ".join(reasons))
