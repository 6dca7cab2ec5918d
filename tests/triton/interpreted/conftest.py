"""Collected only with TRITON_INTERPRET=1; see tests/triton/test_in_interpreter.py."""

import pytest

from mpoe_kernels.linear.triton.plan import launch_plan

from . import interpreter_repair

interpreter_repair.repair()


@pytest.fixture(autouse=True)
def no_plans_of_other_tests() -> None:
    """A test may change what a plan is made from, such as tiles."""
    launch_plan.cache_clear()
