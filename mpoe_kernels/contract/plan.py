"""What to compute, from sizes alone: every strategy's FLOPs and memory, fewest FLOPs first.

These are exact counts of a strategy's products, each computed once; to stay within two weights'
memory, a kernel may compute one again, as eager's `rebuild` does. Nothing here knows backends or
devices; `mpoe_kernels.contract.autotune` chooses what runs among the first of these strategies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from operator import add

import torch

from mpoe_kernels.checks import check_integer
from mpoe_kernels.contract.orders import (
    INDICES,
    STRATEGIES,
    BlockDims,
    applications,
    expected_busy_experts,
)
from mpoe_kernels.contract.program import (
    ALL_GRADIENTS,
    MERGE,
    PHASES,
    Need,
    Product,
    Program,
    program_of,
)
from mpoe_kernels.mpo.shape import MPOShape


@dataclass(frozen=True)
class Contraction:
    """One strategy in one phase, independent of the backend.

    Attributes:
        strategy: one of `STRATEGIES`.
        dims: sizes of the blocks.
        num_experts: E.
        slots: rows N = T K.
        dtype: of x and the blocks.
        phase: ``forward`` or ``backward``.
        need: which gradients a backward computes: x, left, central, right.
        device: ``cpu``, ``cuda:1``, ...; for the backends.
        keeps: the forward of ``separable`` saves its central step's rows for a backward.

    Raises:
        ValueError: an unknown strategy or phase, or ``separable`` for a shape that is not.
    """

    strategy: str
    dims: BlockDims
    num_experts: int
    slots: int
    dtype: torch.dtype
    phase: str
    need: Need = ALL_GRADIENTS
    device: str = "cpu"
    keeps: bool = False

    def __post_init__(self) -> None:
        program_of(self.dims, self.strategy, self.phase)

    @property
    def program(self) -> Program:
        """The products, in order; a backward of ``separable`` takes what its forward saved."""
        return program_of(self.dims, self.strategy, self.phase, self.need)

    @property
    def order(self) -> tuple[str, ...]:
        """The operands that x is multiplied by, in order, e.g. ``("W",)`` or ``("LC", "R")``."""
        return self.program.order

    @property
    def busy_experts(self) -> int:
        """How many experts get slots under uniform random routing."""
        return expected_busy_experts(self.num_experts, self.slots)

    @property
    def device_type(self) -> str:
        """``cpu``, ``cuda``, ..."""
        return self.device.partition(":")[0]

    @cached_property
    def flops(self) -> int:
        """Of all products."""
        return sum(self._product_flops(product) for product in self.program.products)

    def _product_flops(self, product: Product) -> int:
        """Of one product, padding included."""
        dims = self.dims
        axes = self.program.axes
        indices = {*axes[product.first], *axes[product.second]}
        elements = dims.elements(frozenset(indices))
        if product.kind == MERGE:
            return 2 * elements * self.busy_experts
        return 2 * elements * self.slots

    @property
    def temporary_bytes(self) -> int:
        """Peak memory of rebuilt weights and their gradients: W together with the half that it is
        built from; a half together with its gradient."""
        dims = self.dims
        elements = 0
        if self.strategy == "rebuild":
            half = dims.elements(INDICES["LC" if dims.left_first else "CR"])
            elements = dims.weight_elements + half
        elif self.strategy in ("half_left", "half_right"):
            elements = dims.elements(INDICES["LC" if self.strategy == "half_left" else "CR"])
            if self.phase == "backward" and any(self.need[1:]):
                elements *= 2
        if self.slots:
            return elements * self.dtype.itemsize
        return 0

    @property
    def activation_bytes(self) -> int:
        """Peak memory of intermediate rows, neither x nor y: the largest pair of consecutive ones,
        where one is computed from the other."""
        steps = applications(self.dims, self.order)
        between = [0, *[step.after for step in steps[:-1]], 0]
        widest = max(map(add, between, between[1:]))
        return widest * self.slots * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """Both."""
        return self.temporary_bytes + self.activation_bytes


def candidate_strategies(dims: BlockDims) -> Iterator[str]:
    """Strategies worth considering for a shape: a separable shape's chain is called
    ``separable``."""
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
    device: str = "cpu",
    keeps: bool = False,
) -> tuple[Contraction, ...]:
    """Every strategy of one phase whose temporary weights stay within two experts' weights, fewest
    FLOPs first; with the same FLOPs, in the order of `STRATEGIES`.

    Args:
        dims: sizes of the blocks.
        num_experts: E.
        slots: rows N.
        dtype: of x and the blocks.
        phase: ``forward`` or ``backward``.
        need: which gradients a backward computes: x, left, central, right.
        device: for the backends.
        keeps: the forward of ``separable`` saves its central step's rows for the backward.
    """
    limit = 2 * dims.weight_elements * dtype.itemsize
    able = []
    for strategy in candidate_strategies(dims):
        plan = Contraction(strategy, dims, num_experts, slots, dtype, phase, need, device, keeps)
        if plan.temporary_bytes <= limit:
            able.append(plan)
    return tuple(sorted(able, key=lambda plan: plan.flops))


def _in_units(count: float, unit: str, sizes: dict[str, float]) -> str:
    for prefix, size in sizes.items():
        if count >= size:
            return f"{count / size:.3g} {prefix}{unit}"
    return f"{count:.0f} {unit}"


def format_flops(count: float) -> str:
    """``1.23 GFLOP``."""
    return _in_units(count, "FLOP", {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6})


def format_bytes(count: float) -> str:
    """``1.23 MB``, powers of ten."""
    return _in_units(count, "B", {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3})


@dataclass(frozen=True)
class ContractionPlan:
    """A printable ranking of strategies.

    Attributes:
        shape, num_experts, num_tokens, top_k, dtype, training, mask_central: the arguments.
        ranked: every strategy by phase, fewest FLOPs first.
    """

    shape: MPOShape
    num_experts: int
    num_tokens: int
    top_k: int
    dtype: torch.dtype
    training: bool
    mask_central: bool
    ranked: tuple[tuple[Contraction, ...], ...]

    @property
    def phases(self) -> tuple[Contraction, ...]:
        """The first strategy of the forward and, when training, of the backward."""
        return tuple(ranked[0] for ranked in self.ranked)

    @property
    def forward(self) -> Contraction:
        """The forward's strategy of fewest FLOPs."""
        return self.ranked[0][0]

    @property
    def backward(self) -> Contraction | None:
        """The same of the backward, ranked independently; ``None`` unless training."""
        if self.training:
            return self.ranked[1][0]
        return None

    @property
    def strategy(self) -> str:
        """The forward strategy."""
        return self.forward.strategy

    @property
    def backward_strategy(self) -> str | None:
        """The backward strategy; ``None`` unless training."""
        if self.backward is None:
            return None
        return self.backward.strategy

    @property
    def parameters(self) -> int:
        """Of all experts, the shared core counted once."""
        return self.shape.parameters(self.num_experts)

    @property
    def flops(self) -> int:
        """Of all phases."""
        return sum(phase.flops for phase in self.phases)

    @property
    def temporary_bytes(self) -> int:
        """Largest weight memory alive at once besides the blocks: never above two experts'
        weights."""
        return max(phase.temporary_bytes for phase in self.phases)

    @property
    def dense_flops(self) -> int:
        """FLOPs of a dense layer on the same rows, forward, or forward and backward when
        training."""
        weight = self.shape.in_features * self.shape.out_features
        products = 1
        if self.training:
            products = 3
        return 2 * weight * self.num_tokens * self.top_k * products

    @property
    def x_dense(self) -> float:
        """FLOPs over a dense layer's on the same rows (0 without rows)."""
        if self.dense_flops:
            return self.flops / self.dense_flops
        return 0.0

    def explain(self) -> str:
        """Every strategy's FLOPs and memory, the best first: what `mpoe_kernels` chooses from."""
        what = "forward"
        if self.training:
            what = "forward and backward"
        masked = ""
        if self.training and self.mask_central:
            masked = ", central gradient masked"
        size = (
            f"{self.shape.in_features} x {self.shape.out_features}, "
            f"{str(self.dtype).removeprefix('torch.')}"
        )
        busy = self.forward.busy_experts
        lines = [
            f"{size}; {self.num_experts:,} experts ({busy:,} expected busy), {self.parameters:,} "
            f"parameters, {self.num_tokens:,} tokens x top-{self.top_k}; {what}{masked}",
            f"in all {format_flops(self.flops)} ({self.x_dense:.3g} x dense), "
            f"{format_bytes(self.temporary_bytes)} of temporary weights",
        ]
        for ranked in self.ranked:
            rows = [(ranked[0].phase, "rows meet", "work", "temporary")]
            for plan in ranked:
                order = ", ".join(plan.order)
                work = format_flops(plan.flops)
                memory = format_bytes(plan.temporary_bytes)
                rows.append((plan.strategy, order, work, memory))
            columns = zip(*rows, strict=True)
            widths = [max(map(len, column)) for column in columns]
            for strategy, order, work, memory in rows:  # words to the left, numbers to the right
                words = f"  {strategy:{widths[0]}}  {order:{widths[1]}}"
                lines.append(f"{words}  {work:>{widths[2]}}  {memory:>{widths[3]}}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()


def plan_contraction(
    shape: MPOShape,
    num_experts: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    top_k: int = 1,
    training: bool = False,
    mask_central: bool = False,
) -> ContractionPlan:
    """Rank the strategies for contracting ``num_tokens * top_k`` rows with ``num_experts`` experts
    of ``shape``.

    The ops rank in the same way whenever they run, and time the first two with the backends that
    are here once, see `mpoe_kernels.contract.autotune`; in compiled graphs they are opaque, so one
    graph serves any number of rows. This function shows the ranking; it is plain Python, for use
    outside graphs.

    Args:
        shape: shape of the matrix.
        num_experts: experts sharing the central core.
        num_tokens: tokens T, may be zero.
        dtype: of activations and cores, floating.
        top_k: experts per token.
        training: include the backward pass.
        mask_central: the central core's gradient is not needed.

    Returns:
        A frozen, printable plan.

    Raises:
        TypeError, ValueError: a shape that is no `MPOShape`, counts that are not positive integers
            (tokens: negative), a dtype that is not a floating ``torch.dtype``.
    """
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    check_integer("num_experts", num_experts, 1)
    check_integer("num_tokens", num_tokens, 0)
    check_integer("top_k", top_k, 1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating torch.dtype; got {dtype!r}")
    dims = BlockDims.of_shape(shape)
    need = (True, True, not mask_central, True)
    slots = num_tokens * top_k
    ranked = [contractions(dims, num_experts, slots, dtype, phase, need) for phase in PHASES]
    if training and dims.is_separable:
        # Its forward saves its central step's result for the backward.
        ranked[0] = tuple(c for c in ranked[0] if c.strategy == "separable")
    return ContractionPlan(
        shape=shape,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        dtype=dtype,
        training=training,
        mask_central=mask_central,
        ranked=tuple(ranked if training else ranked[:1]),
    )
