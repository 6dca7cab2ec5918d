"""One strategy evaluated in one phase: its steps, FLOPs, bytes and temporary bytes, from sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from mpoe_kernels.planner.cost import step_time
from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.orders import INDICES, STRATEGIES, Application, BlockDims, applications, program
from mpoe_kernels.planner.steps import Step

PHASES = ("forward", "backward")
# Which gradients a backward computes: x, left, central, right.
Need = tuple[bool, bool, bool, bool]
ALL_GRADIENTS: Need = (True, True, True, True)
_COMPOSITES = ("LC", "CR", "W")


@dataclass(frozen=True)
class Contraction:
    """One strategy in one phase, whoever computes it.

    Attributes:
        strategy: one of `STRATEGIES`.
        phase: ``forward`` or ``backward``.
        order: what x meets, e.g. ``("W",)`` or ``("LC", "R")``.
        dims: sizes of the blocks.
        num_experts, busy_experts: E, and how many of them get slots under uniform random routing.
        slots: rows N = T K.
        dtype: of x and the blocks.
        need: which gradients a backward computes: x, left, central, right.
        mask_central: the central gradient is not computed (``need[2]`` is then False).
        steps: the GEMMs in order.
        flops: of all steps.
        bytes: read and written by all steps.
        temporary_bytes: largest weight memory alive at once: built weights and their gradients.
        activation_bytes: intermediate rows (neither x nor y), the largest neighbours alive at once.
        device: ``cpu``, ``cuda:1``, ...; for the cost functions of backends.
    """

    strategy: str
    phase: str
    order: tuple[str, ...]
    dims: BlockDims
    num_experts: int
    busy_experts: int
    slots: int
    dtype: torch.dtype
    need: Need
    mask_central: bool
    steps: tuple[Step, ...]
    flops: int
    bytes: int
    temporary_bytes: int
    activation_bytes: int
    device: str = "cpu"

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda``, ..."""
        return self.device.partition(":")[0]

    def seconds(self, hardware: Hardware) -> float:
        """Predicted time: of every step, one after the other."""
        return sum(self.parts(hardware))

    def parts(self, hardware: Hardware) -> tuple[float, float, float]:
        """`seconds` split into arithmetic, memory traffic that it does not hide, and overhead."""
        times = [step_time(step, self.dtype, hardware) for step in self.steps]
        return sum(t.compute for t in times), sum(t.memory for t in times), sum(t.overhead for t in times)

    def memory_bytes(self, hardware: Hardware) -> int:
        """The part of ``bytes`` that crosses to and from memory, not only the last-level cache."""
        return sum(step.memory_bytes(hardware.cache_bytes) for step in self.steps)

    @property
    def calls(self) -> int:
        """GEMMs of all steps."""
        return sum(step.batch for step in self.steps)


def expected_busy_experts(num_experts: int, slots: int) -> int:
    """Expected number of experts that get at least one of ``slots`` under uniform random routing, rounded."""
    if slots == 0:
        return 0
    return max(1, round(num_experts * (1 - (1 - 1 / num_experts) ** slots)))


class _Steps:
    """Collects the steps of one contraction."""

    def __init__(self, dims: BlockDims, busy: int, slots: int, itemsize: int) -> None:
        self.dims, self.busy, self.slots, self.itemsize = dims, busy, slots, itemsize
        self.found: list[Step] = []

    def operand_bytes(self, operand: str) -> int:
        return self.dims.elements(INDICES[operand]) * self.itemsize

    def _add(
        self,
        name: str,
        sizes: tuple[float, float, float],
        reads: list[str],
        writes: list[str],
        rows: list[tuple[int, bool]],
    ) -> None:
        """``reads`` and ``writes`` name operands; ``rows`` holds (elements per slot, whether intermediate).

        The last of the rows are written, unless an operand is.
        """
        shared = all(operand == "C" for operand in (*reads, *writes))
        batch = 1 if shared else self.busy
        read = sum(self.operand_bytes(o) for o in reads) * batch
        write = sum(self.operand_bytes(o) for o in writes) * batch
        cached = working = 0
        for operand in (*reads, *writes):
            size = self.operand_bytes(operand)
            if operand in _COMPOSITES:
                cached, working = cached + size * batch, working + size
            elif operand == "C":
                cached, working = cached + size * (batch - 1), working + size
        for position, (elements, intermediate) in enumerate(rows):
            size = elements * self.slots * self.itemsize
            if writes or position < len(rows) - 1:
                read += size
            else:
                write += size
            if intermediate:
                cached, working = cached + size, working + size
        kind = "gemm" if shared else "grouped_gemm"
        self.found.append(Step(name, kind, *sizes, batch, read, write, cached, working))

    def merge(self, result: str, first: str, second: str) -> None:
        m, n, k = self._merge_sizes(first, second)
        self._add(f"{result} = {first} {second}", (m, n, k), [first, second], [result], [])

    def merge_gradient(self, result: str, first: str, second: str, of_first: bool) -> None:
        """``d first = d result second^T`` or ``d second = first^T d result``."""
        m, n, k = self._merge_sizes(first, second)
        wanted, other = (first, second) if of_first else (second, first)
        self._add(f"d {wanted}", (m, k, n) if of_first else (k, n, m), [result, other], [wanted], [])

    def _merge_sizes(self, first: str, second: str) -> tuple[int, int, int]:
        p, q = INDICES[first], INDICES[second]
        return self.dims.elements(p - q), self.dims.elements(q - p), self.dims.elements(p & q)

    def _rows(self, step: Application) -> float:
        """Rows of one GEMM."""
        return step.m * self.slots / (1 if step.operand == "C" else self.busy)

    def apply(self, name: str, step: Application, inner: tuple[bool, bool]) -> None:
        """Rows through an operand; ``inner``: whether the rows before and after are intermediate."""
        rows = [(step.before, inner[0]), (step.after, inner[1])]
        self._add(name, (self._rows(step), step.n, step.k), [step.operand], [], rows)

    def apply_gradient(self, name: str, step: Application, inner: tuple[bool, bool]) -> None:
        """Gradient of the rows before, from that of the rows after."""
        rows = [(step.after, inner[1]), (step.before, inner[0])]
        self._add(name, (self._rows(step), step.k, step.n), [step.operand], [], rows)

    def operand_gradient(self, step: Application, inner: tuple[bool, bool]) -> None:
        """Gradient of the operand from the rows before and the gradient of the rows after."""
        rows = [(step.before, inner[0]), (step.after, inner[1])]
        self._add(f"d {step.operand}", (step.k, step.n, self._rows(step)), [], [step.operand], rows)


def _parts(operand: str) -> str:
    return "LCR" if operand == "W" else operand


def _inner(k: int, count: int) -> tuple[bool, bool]:
    return k > 0, k < count - 1


def _forward(steps: _Steps, strategy: str) -> None:
    merges, order = program(steps.dims, strategy)
    for merge in merges:
        steps.merge(*merge)
    chain = applications(steps.dims, order)
    for k, step in enumerate(chain):
        steps.apply(f"rows {step.operand}", step, _inner(k, len(chain)))


def _used_values(merges: tuple[tuple[str, str, str], ...], used: set[str], wanted: set[str]) -> set[str]:
    """Built operands whose values a backward reads: ``used`` by rows, or the other factor in a merge's gradient."""
    for result, first, second in reversed(merges):
        if result in wanted:
            used = used | ({second} if first in wanted else set()) | ({first} if second in wanted else set())
    for result, first, second in reversed(merges):
        if result in used:
            used = used | {first, second}
    return used


def _backward(steps: _Steps, strategy: str, need: Need) -> None:
    merges, order = program(steps.dims, strategy)
    chain = applications(steps.dims, order)
    count = len(chain)
    needed = {block for block, n in zip("LCR", need[1:], strict=True) if n}
    # Operands whose gradient leads to a needed one.
    wanted = {o for o in ("L", "C", "R", *_COMPOSITES) if needed & set(_parts(o))}
    before_needed = [need[0] or any(o in wanted for o in order[:k]) for k in range(count)]
    last = max((k for k in range(count) if order[k] in wanted), default=0)
    # The separable forward saved its central step's result, the rows that meet R.
    recomputed = min(last, 1) if strategy == "separable" else last
    if strategy == "separable" and "C" not in wanted:
        recomputed = 0
    used = {o for k, o in enumerate(order) if before_needed[k] or k < recomputed}
    values = _used_values(merges, used, wanted)
    for result, first, second in merges:
        if result in values:
            steps.merge(result, first, second)
    for k in range(recomputed):
        steps.apply(f"rows {order[k]} again", chain[k], _inner(k, count))
    for k in reversed(range(count)):
        if order[k] in wanted:
            steps.operand_gradient(chain[k], _inner(k, count))
        if before_needed[k]:
            steps.apply_gradient("d x" if k == 0 else f"d rows before {order[k]}", chain[k], _inner(k, count))
    for result, first, second in reversed(merges):
        if result in wanted:
            if first in wanted:
                steps.merge_gradient(result, first, second, of_first=True)
            if second in wanted:
                steps.merge_gradient(result, first, second, of_first=False)


def _temporary_elements(dims: BlockDims, strategy: str, phase: str, need: Need) -> int:
    """Weights alive at once: W with the half it is built from; a half with its gradient."""
    if strategy == "rebuild":
        return dims.weight_elements + dims.elements(INDICES["LC" if dims.left_first else "CR"])
    if strategy in ("half_left", "half_right"):
        half = dims.elements(INDICES["LC" if strategy == "half_left" else "CR"])
        return 2 * half if phase == "backward" and any(need[1:]) else half
    return 0


def _activation_elements(dims: BlockDims, strategy: str) -> int:
    """Intermediate rows per slot: the largest pair of neighbours of which one is computed from the other."""
    _, order = program(dims, strategy)
    between = [step.after for step in applications(dims, order)[:-1]]
    if not between:
        return 0
    return max(sum(pair) for pair in zip([0, *between], [*between, 0], strict=True))


@lru_cache(maxsize=4096)
def contraction(
    strategy: str,
    dims: BlockDims,
    num_experts: int,
    slots: int,
    dtype: torch.dtype,
    phase: str,
    need: Need = ALL_GRADIENTS,
    mask_central: bool = False,
    device: str = "cpu",
) -> Contraction:
    """One strategy in one phase; see `Contraction` for the arguments.

    Raises:
        ValueError: an unknown strategy or phase, or ``separable`` for a shape that is not.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {PHASES}; got {phase!r}")
    if mask_central:
        need = (need[0], need[1], False, need[3])
    busy = expected_busy_experts(num_experts, slots)
    steps = _Steps(dims, busy, slots, dtype.itemsize)
    _, order = program(dims, strategy)
    if slots:
        if phase == "forward":
            _forward(steps, strategy)
        elif any(need):
            _backward(steps, strategy, need)
    found = tuple(steps.found)
    return Contraction(
        strategy=strategy,
        phase=phase,
        order=order,
        dims=dims,
        num_experts=num_experts,
        busy_experts=busy,
        slots=slots,
        dtype=dtype,
        need=need,
        mask_central=mask_central,
        steps=found,
        flops=round(sum(step.flops for step in found)),
        bytes=sum(step.bytes for step in found),
        temporary_bytes=_temporary_elements(dims, strategy, phase, need) * dtype.itemsize if found else 0,
        activation_bytes=_activation_elements(dims, strategy) * slots * dtype.itemsize,
        device=device,
    )


def candidate_strategies(dims: BlockDims) -> Iterator[str]:
    """Strategies worth considering for a shape: a separable shape's chain is called ``separable``."""
    for strategy in STRATEGIES:
        if strategy != ("chain" if dims.is_separable else "separable"):
            yield strategy


@lru_cache(maxsize=4096)
def contractions(
    dims: BlockDims,
    num_experts: int,
    slots: int,
    dtype: torch.dtype,
    phase: str,
    need: Need = ALL_GRADIENTS,
    mask_central: bool = False,
    device: str = "cpu",
) -> tuple[Contraction, ...]:
    """Every candidate of one phase whose temporary weights stay within two experts' weights.

    Args:
        dims: sizes of the blocks.
        num_experts: E.
        slots: rows N.
        dtype: of x and the blocks.
        phase: ``forward`` or ``backward``.
        need: which gradients a backward computes: x, left, central, right.
        mask_central: the central gradient is not needed.
        device: where, for the cost functions of backends.
    """
    found = (
        contraction(strategy, dims, num_experts, slots, dtype, phase, need, mask_central, device)
        for strategy in candidate_strategies(dims)
    )
    limit = 2 * dims.weight_elements * dtype.itemsize
    return tuple(c for c in found if c.temporary_bytes <= limit)
