"""The documentation corpus is read once per test session."""

from __future__ import annotations

import pytest

from mpoe.data.documentation import Documentation, load_documentation


@pytest.fixture(scope="session")
def documentation() -> Documentation:
    """The running Python's documentation."""
    return load_documentation()
