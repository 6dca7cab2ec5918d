"""Choosing what to compute from shapes."""

from mpoe_kernels.planner.calibrate import calibrate
from mpoe_kernels.planner.contraction import Contraction, contraction, contractions
from mpoe_kernels.planner.device import hardware_here, hardware_of, may_round_to_tf32, planned_threads
from mpoe_kernels.planner.hardware import HARDWARE, Hardware
from mpoe_kernels.planner.orders import STRATEGIES, BlockDims
from mpoe_kernels.planner.plan import ContractionPlan, plan_contraction
from mpoe_kernels.planner.program import ALL_GRADIENTS, Program, program_of
from mpoe_kernels.planner.steps import Step

__all__ = [
    "ALL_GRADIENTS",
    "HARDWARE",
    "STRATEGIES",
    "BlockDims",
    "Contraction",
    "ContractionPlan",
    "Hardware",
    "Program",
    "Step",
    "calibrate",
    "contraction",
    "contractions",
    "hardware_here",
    "hardware_of",
    "may_round_to_tf32",
    "plan_contraction",
    "planned_threads",
    "program_of",
]
