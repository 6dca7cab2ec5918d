"""What the eager kernels can compute, and how long they are predicted to take.

The planner's time of every step, and what the kernels do besides: Python around every GEMM, copies that bring tensors
into the order that the next GEMM wants, and slabs.
"""

from __future__ import annotations

from mpoe_kernels.backends.eager.rebuild import SLAB_BYTES
from mpoe_kernels.planner import Contraction, Hardware, hardware_here
from mpoe_kernels.planner.orders import applications

IMPLEMENTED = ("rebuild", "half_left", "half_right", "chain", "separable")

# Seconds of Python: for slicing the operands of one GEMM of an expert, and for the op around all of them.
CALL_SECONDS = 4e-6
OP_SECONDS = 50e-6
# Of the memory bandwidth, what a copy reaches whose runs are a few elements long.
PERMUTED = 0.3


def contraction_reasons(plan: Contraction) -> list[str]:
    """Why the eager kernels cannot compute a contraction."""
    if plan.strategy not in IMPLEMENTED:
        return [f"it has no kernel for the strategy {plan.strategy!r}"]
    return []


def _slabs(plan: Contraction) -> int:
    """Slabs of a rebuilt weight, see `rebuild`."""
    least = -(-plan.dims.weight_elements * plan.dtype.itemsize // SLAB_BYTES)
    return min(plan.dims.iL, max(4, least))


def _copied_elements(plan: Contraction) -> int:
    """Elements that copies with short runs read and write."""
    dims, times = plan.dims, 1 if plan.phase == "forward" else 2
    if plan.strategy == "rebuild":  # from the blocks' order to the weight's, and back for its gradient
        return 0 if dims.is_separable else times * dims.weight_elements * plan.busy_experts
    # The rows that meet an operand, and their gradients; those between a separable shape's steps lie as they should.
    steps = applications(dims, plan.order)[: 1 if plan.strategy == "separable" else None]
    return times * plan.slots * sum(step.before for step in steps)


def _calls(plan: Contraction) -> int:
    """GEMMs."""
    slabs = _slabs(plan) if plan.strategy == "rebuild" else 1
    return sum(step.batch * (slabs if "W" in step.name else 1) for step in plan.steps)


def _seconds(plan: Contraction, hardware: Hardware) -> float:
    calls = _calls(plan)
    # Every GEMM is a call, or a launch, of its own.
    each = hardware.call_seconds.of(plan.dtype) if hardware.kind == "cpu" else hardware.launch_seconds
    overhead = OP_SECONDS + calls * CALL_SECONDS + max(0, calls - plan.calls) * each
    copied = 2 * _copied_elements(plan) * plan.dtype.itemsize
    return plan.seconds(hardware) + overhead + copied / (PERMUTED * hardware.bandwidth)


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the eager kernels."""
    return _seconds(plan, hardware_here(plan.device_type))
