"""Choosing what to compute from shapes."""

from mpoe_kernels.planner.plan import BlockDims, ContractionPlan, choose_strategy, plan_contraction

__all__ = ["BlockDims", "ContractionPlan", "choose_strategy", "plan_contraction"]
