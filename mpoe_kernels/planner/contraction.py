"""One strategy evaluated in one phase: its steps, FLOPs, bytes and temporary bytes, from sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from mpoe_kernels.planner.cost import step_time
from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.orders import AXES, INDICES, STRATEGIES, BlockDims, applications, recipe
from mpoe_kernels.planner.program import (
    ALL_GRADIENTS,
    COMPOSITES,
    GRADIENT,
    MERGE,
    ROWS,
    Need,
    Product,
    Program,
    is_block,
    program_of,
    value_of,
)
from mpoe_kernels.planner.steps import Step


@dataclass(frozen=True)
class Contraction:
    """One strategy in one phase, independent of the backend.

    Attributes:
        strategy: one of `STRATEGIES`.
        phase: ``forward`` or ``backward``.
        order: the operands that x is multiplied by, in order, e.g. ``("W",)`` or ``("LC", "R")``.
        program: the products, in order; a backward of ``separable`` takes what its forward saved.
        dims: sizes of the blocks.
        num_experts, busy_experts: E, and how many of them get slots under uniform random routing.
        slots: rows N = T K.
        dtype: of x and the blocks.
        need: which gradients a backward computes: x, left, central, right.
        mask_central: the central gradient is not computed (``need[2]`` is then False).
        steps: the GEMMs of the products, in order.
        flops: of all steps.
        bytes: read and written by all steps.
        temporary_bytes: peak memory of rebuilt weights and their gradients.
        activation_bytes: peak memory of intermediate rows (neither x nor y).
        device: ``cpu``, ``cuda:1``, ...; for the cost functions of backends.
        keeps: the forward of ``separable`` saves its central step's rows for a backward.
    """

    strategy: str
    phase: str
    order: tuple[str, ...]
    program: Program
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
    keeps: bool = False

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda``, ..."""
        return self.device.partition(":")[0]

    def seconds(self, hardware: Hardware) -> float:
        """Predicted time: the sum over all steps."""
        return sum(self.parts(hardware))

    def parts(self, hardware: Hardware) -> tuple[float, float, float]:
        """`seconds` split into arithmetic, memory traffic not hidden by it, and overhead."""
        times = [step_time(step, self.dtype, hardware) for step in self.steps]
        return sum(t.compute for t in times), sum(t.memory for t in times), sum(t.overhead for t in times)

    def memory_bytes(self, hardware: Hardware) -> int:
        """The part of ``bytes`` that moves to or from memory rather than only the last-level cache."""
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


class _Pricing:
    """Sizes and traffic of a program's products for so many slots and busy experts."""

    def __init__(self, program: Program, dims: BlockDims, busy: int, slots: int, itemsize: int) -> None:
        self.program, self.dims, self.busy, self.slots, self.itemsize = program, dims, busy, slots, itemsize

    def steps(self) -> tuple[Step, ...]:
        made: set[str] = set()
        found = []
        for product in self.program.products:
            found.append(self._step(product, self._name(product, made)))
            made.add(product.result)
        return tuple(found)

    def _name(self, product: Product, made: set[str]) -> str:
        kind, result, first, second, _ = product
        if kind == MERGE and result in AXES:
            return f"{result} = {first} {second}"
        if kind == ROWS and result.startswith("d "):
            return "d x" if result == "d x" else f"d rows before {second}"
        if kind == ROWS:
            return f"rows {second}" if self.program.phase == "forward" else f"rows {second} again"
        return result

    def _extents(self, product: Product) -> tuple[int, int, int]:
        """``m, n, k`` without slots; a whole weight is cropped to its true size before it is used."""
        _, result, first, second, _ = product
        p, q, r = (frozenset(self.program.axes[name]) for name in (first, second, result))
        m, n, k = (self.dims.elements(indices) for indices in (p & r - q, q & r - p, p & q - r))
        i, f = self.dims.in_features, self.dims.out_features
        if product.kind == ROWS and second == "W":
            return (m, i, f) if result == "d x" else (m, f, i)
        return (i, f, k) if product.kind == GRADIENT and result == "d W" else (m, n, k)

    def _row_elements(self, name: str) -> int:
        """Elements of the rows per slot, as a product reads them."""
        if value_of(name) in ("x", "y") and self.program.order == ("W",):
            return self.dims.in_features if value_of(name) == "x" else self.dims.out_features
        return self.dims.elements(frozenset(self.program.axes[name]))

    def _step(self, product: Product, name: str) -> Step:
        """Every operand is read or written once for each busy expert; a product of the shared block alone, only
        once."""
        kind, result, first, second, _ = product
        operands = [value_of(n) for n in (first, second, result) if is_block(n)]
        shared = all(operand == "C" for operand in operands)
        batch = 1 if shared else self.busy
        read = write = cached = working = 0
        for n in (first, second, result):
            if is_block(n):
                size = self.dims.elements(INDICES[value_of(n)]) * self.itemsize
                moved, again = size * batch, size * batch if value_of(n) in COMPOSITES else size * (batch - 1)
                inner = value_of(n) in (*COMPOSITES, "C")
                cached, working = cached + (again if inner else 0), working + (size if inner else 0)
            else:
                size = moved = self._row_elements(n) * self.slots * self.itemsize
                if value_of(n) not in ("x", "y"):
                    cached, working = cached + size, working + size
            read, write = (read, write + moved) if n == result else (read + moved, write)
        m, n_columns, k = self._extents(product)
        sizes: tuple[float, float, float] = (m, n_columns, k)
        if kind == ROWS:
            sizes = (m * self.slots / batch, n_columns, k)
        elif kind == GRADIENT:
            sizes = (m, n_columns, k * self.slots / batch)
        return Step(name, "gemm" if shared else "grouped_gemm", *sizes, batch, read, write, cached, working)


def _temporary_elements(dims: BlockDims, strategy: str, phase: str, need: Need) -> int:
    """Peak of weights: W together with the half that it is built from; a half together with its gradient."""
    if strategy == "rebuild":
        return dims.weight_elements + dims.elements(INDICES["LC" if dims.left_first else "CR"])
    if strategy in ("half_left", "half_right"):
        half = dims.elements(INDICES["LC" if strategy == "half_left" else "CR"])
        return 2 * half if phase == "backward" and any(need[1:]) else half
    return 0


def _activation_elements(dims: BlockDims, strategy: str) -> int:
    """Intermediate rows per slot: the largest pair of consecutive ones, where one is computed from the other."""
    _, order = recipe(dims, strategy)
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
    keeps: bool = False,
) -> Contraction:
    """One strategy in one phase; see `Contraction` for the arguments.

    Raises:
        ValueError: an unknown strategy or phase, or ``separable`` for a shape that is not.
    """
    if mask_central:
        need = (need[0], need[1], False, need[3])
    busy = expected_busy_experts(num_experts, slots)
    program = program_of(dims, strategy, phase, need)
    found = _Pricing(program, dims, busy, slots, dtype.itemsize).steps() if slots else ()
    return Contraction(
        strategy=strategy,
        phase=phase,
        order=program.order,
        program=program,
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
        keeps=keeps,
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
    keeps: bool = False,
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
        device: for the cost functions of backends.
        keeps: the forward of ``separable`` saves its central step's rows for the backward.
    """
    found = (
        contraction(strategy, dims, num_experts, slots, dtype, phase, need, mask_central, device, keeps)
        for strategy in candidate_strategies(dims)
    )
    limit = 2 * dims.weight_elements * dtype.itemsize
    return tuple(c for c in found if c.temporary_bytes <= limit)
