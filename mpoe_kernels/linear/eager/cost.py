"""Predicted times of the eager kernels.

The planner's time of every step, plus overheads: Python around every GEMM, copies that bring tensors into the layout
that the next GEMM needs, and the first use of memory that the allocator gets from the system.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from mpoe_kernels.linear.eager.rows import experts_at_once, most_slots
from mpoe_kernels.linear.eager.weight import SLAB_BYTES
from mpoe_kernels.planner import Contraction, Hardware, hardware_here
from mpoe_kernels.planner.cost import new_bytes
from mpoe_kernels.planner.orders import AXES, INDICES, Y_AXES, applications

# Seconds of Python: for slicing the operands of one GEMM of an expert, for the op around all of them, and for each
# expert whose gradients a backward stores, whether it was busy or not. The last two are of a 32 x 32 weight on an AMD
# EPYC (Genoa).
CALL_SECONDS = 4e-6
OP_SECONDS = {"forward": 150e-6, "backward": 300e-6}
EXPERT_SECONDS = 4e-6
# A copy in runs shorter than a cache line reaches this fraction of the memory bandwidth.
LINE_BYTES = 64
SHORT_RUNS = 0.3
# Elements this far apart share one set of an L1 cache: with more of them than it has ways, each read fetches a line
# again. Seconds per element and thread: 2.0e-9 for 32 elements, 3.0e-9 for 128, in bfloat16 and float32, on an EPYC.
SET_STRIDE, WAYS, ALIASED_SECONDS = 4096, 8, 2e-9
# Steps computed in one GEMM for all experts of a chunk, besides those of the central block alone.
_TOGETHER = {"half_left": ("LC = L C", "d L", "d C"), "half_right": ("CR = C R", "d R")}

Axes = tuple[str, ...]


class _Traffic:
    """Counts bytes that copies read and write (weighted for short runs), elements that they read from one set of a
    cache, and bytes of new memory.

    Args:
        chunks: number of pieces in which a tensor of the whole call is allocated.
    """

    def __init__(self, plan: Contraction, chunks: int) -> None:
        self.dims, self.itemsize, self.chunks = plan.dims, plan.dtype.itemsize, chunks
        self.copied = self.aliased = self.new = 0.0

    def allocate(self, elements: float) -> None:
        self.new += self.chunks * new_bytes(elements * self.itemsize / self.chunks)

    def copy(self, elements: float, before: Axes, after: Axes, into_new: bool = True) -> None:
        """Copy from one order of axes to another; free if the layouts are the same."""
        first, second = ([axis for axis in axes if getattr(self.dims, axis) > 1] for axes in (before, after))
        if first == second:
            return
        run, inner = self.itemsize, second[-1]
        apart = self.itemsize * math.prod(getattr(self.dims, axis) for axis in first[first.index(inner) + 1 :])
        while first[-1] == second[-1]:
            run *= getattr(self.dims, first.pop())
            second.pop()
        self.copied += 2 * elements * self.itemsize / (SHORT_RUNS if run < LINE_BYTES else 1.0)
        if run == self.itemsize and apart % SET_STRIDE == 0 and getattr(self.dims, inner) > WAYS:
            self.aliased += elements
        if into_new:
            self.allocate(elements)


def _rebuild(plan: Contraction) -> tuple[int, _Traffic]:
    """GEMM calls and traffic: every weight, and its gradient, is copied from one order to the other in slabs."""
    dims, traffic = plan.dims, _Traffic(plan, chunks=1)
    for _ in range(1 if plan.phase == "forward" else 2):
        elements = dims.weight_elements * plan.busy_experts
        orders = ("iL", "jL", "iC", "jC", "iR", "jR"), ("iL", "iC", "iR", "jL", "jC", "jR")
        traffic.copy(elements, *orders, into_new=False)
    traffic.allocate(plan.temporary_bytes / plan.dtype.itemsize)
    slabs = min(dims.iL, max(4, math.ceil(dims.weight_elements * plan.dtype.itemsize / SLAB_BYTES)))
    # Products with rows are one GEMM, products with blocks one for each slab.
    return sum(
        s.batch * (slabs if s.name in ("W = LC R", "W = L CR", "d LC", "d R") else 1) for s in plan.steps
    ), traffic


def _chunks(plan: Contraction) -> int:
    """Groups of experts that the rows strategies process one after the other."""
    experts = experts_at_once(plan.dims, plan.program.built, plan.busy_experts)
    by_slots = math.ceil(plan.slots / most_slots(plan.dims, plan.program, plan.dtype.itemsize))
    return min(plan.busy_experts, max(math.ceil(plan.busy_experts / experts), by_slots))


class _Meeting(NamedTuple):
    """Axes of the rows before an operand, the remaining axes, the contracted axes, and the operand's new axes."""

    operand: str
    before: Axes
    rest: Axes
    met: Axes
    new: Axes

    @property
    def after(self) -> Axes:
        return self.rest + self.new


@lru_cache(maxsize=64)
def _meetings(order: Axes) -> tuple[_Meeting, ...]:
    """Layouts of the rows at the operands of ``order``."""
    state: Axes = ("iL", "iC", "iR")
    found: list[_Meeting] = []
    for operand in order:
        axes = AXES[operand]
        met = tuple(axis for axis in state if axis in axes)
        rest = tuple(axis for axis in state if axis not in axes)
        found.append(_Meeting(operand, state, rest, met, tuple(axis for axis in axes if axis not in met)))
        state = found[-1].after
    return tuple(found)


def _rows(plan: Contraction) -> tuple[int, _Traffic]:
    """GEMM calls and traffic: states and operands are copied if a GEMM's contracted axes are not adjacent."""
    dims, chunks, backward = plan.dims, _chunks(plan), plan.phase == "backward"
    traffic = _Traffic(plan, chunks)
    separable = plan.strategy == "separable"
    steps = list(zip(_meetings(plan.order), applications(dims, plan.order), strict=True))
    traffic.allocate(plan.slots * dims.in_features)  # gathered
    for k, (step, sizes) in enumerate(steps):
        is_last = k == len(steps) - 1
        before, after = plan.slots * sizes.before, plan.slots * sizes.after
        operand = dims.elements(INDICES[step.operand]) * (chunks if step.operand == "C" else plan.busy_experts)
        matrix = step.met + step.new
        if len(step.operand) > 1:
            traffic.allocate(operand)
        if not (backward and is_last and separable):  # whose last state was saved
            traffic.copy(before, step.before, step.rest + step.met)
        # Forward; backward, the gradient of the state, and all states but the last again.
        for _ in range(1 if not backward or is_last else 2):
            traffic.copy(operand, AXES[step.operand], matrix)
        if not is_last:
            traffic.allocate(after)
        if backward:
            traffic.allocate(before)
            traffic.copy(before, step.rest + step.met, step.before)
            traffic.allocate(operand)
            traffic.copy(operand, matrix, AXES[step.operand])
    last = steps[-1][0].after
    if not separable:
        traffic.allocate(plan.slots * steps[-1][1].after)
    traffic.copy(plan.slots * dims.out_features, last, Y_AXES, into_new=backward)
    together = _TOGETHER.get(plan.strategy, ())
    return sum(chunks if s.kind == "gemm" or s.name in together else s.batch for s in plan.steps), traffic


def _seconds(plan: Contraction, hardware: Hardware) -> float:
    op = OP_SECONDS[plan.phase] + (EXPERT_SECONDS * plan.num_experts if plan.phase == "backward" else 0.0)
    if not plan.steps:
        return op
    calls, traffic = (_rebuild if plan.strategy == "rebuild" else _rows)(plan)
    # Every GEMM is a separate call or launch.
    each = hardware.call_seconds.of(plan.dtype) if hardware.kind == "cpu" else hardware.launch_seconds
    overhead = op + calls * CALL_SECONDS + (calls - plan.calls) * each
    memory = traffic.copied / hardware.bandwidth + traffic.new / hardware.new_memory_bandwidth
    if hardware.kind == "cpu":
        memory += traffic.aliased * ALIASED_SECONDS / hardware.units
    return plan.seconds(hardware) + overhead + memory


def predicted_seconds(plan: Contraction) -> float:
    """Time of a contraction with the eager kernels."""
    return _seconds(plan, hardware_here(plan.device))
