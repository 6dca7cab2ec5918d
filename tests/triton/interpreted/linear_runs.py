"""One grouped MPO product, forward and backward, by the Triton kernels."""

from __future__ import annotations

from mpoe_kernels import MPOShape
from mpoe_kernels.linear.grouped import ON_CHIP
from mpoe_kernels.linear.triton import BY_PRODUCTS, fused_launch
from tests.linear_problem import KernelProblem, planned_strategies


def strategies_of(shape: MPOShape) -> list[str]:
    """What the planner may choose, and the fused kernels."""
    return planned_strategies(shape) + ([] if shape.is_separable else [ON_CHIP])


class Case(KernelProblem):
    KERNELS, BACKEND = staticmethod(lambda strategy: fused_launch if strategy == ON_CHIP else BY_PRODUCTS), "triton"
