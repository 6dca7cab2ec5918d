"""Collected only with TRITON_INTERPRET=1; see tests/triton/test_in_interpreter.py."""

import pytest

from mpoe_kernels.linear.triton.plan import forget_plans

from . import interpreter_repair

interpreter_repair.repair()


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> None:
    """A test may change what plans are made from, such as tiles."""
    forget_plans()
