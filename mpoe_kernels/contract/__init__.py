"""The contraction of rows with MPO blocks: orders and FLOPs, programs, plans, and the choice among
what can run."""

from mpoe_kernels.contract.orders import STRATEGIES, BlockDims, expected_busy_experts
from mpoe_kernels.contract.plan import (
    Contraction,
    ContractionPlan,
    contractions,
    plan_contraction,
)
from mpoe_kernels.contract.precision import float32_mm, may_round_to_tf32
from mpoe_kernels.contract.program import ALL_GRADIENTS, Program, program_of

__all__ = [
    "ALL_GRADIENTS",
    "STRATEGIES",
    "BlockDims",
    "Contraction",
    "ContractionPlan",
    "Program",
    "contractions",
    "expected_busy_experts",
    "float32_mm",
    "may_round_to_tf32",
    "plan_contraction",
    "program_of",
]
