"""What to compute: the strategy for contracting x with the blocks, from shapes alone.

This is the minimal planner: it counts FLOPs of the strategies that the eager backend knows. It knows no backend, does
no device synchronisation and is a pure function of sizes, so it may be called inside fake and compiled code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mpoe_kernels.checks import check_choice
from mpoe_kernels.mpo.shape import MPOShape

STRATEGIES = ("rebuild", "chain", "separable")


class BlockDims(NamedTuple):
    """Sizes of the folded blocks and of the true weight."""

    iL: int
    jL: int
    a: int
    iC: int
    jC: int
    b: int
    iR: int
    jR: int
    in_features: int
    out_features: int

    @classmethod
    def of_blocks(
        cls, left: torch.Tensor, central: torch.Tensor, right: torch.Tensor, in_features: int, out_features: int
    ) -> BlockDims:
        _, rows_l, cols_l, a = left.shape
        _, rows_c, cols_c, b = central.shape
        _, _, rows_r, cols_r = right.shape
        return cls(rows_l, cols_l, a, rows_c, cols_c, b, rows_r, cols_r, in_features, out_features)

    @property
    def is_separable(self) -> bool:
        return self.jL == 1 and self.iR == 1

    @property
    def weight_elements(self) -> int:
        """Elements of one rebuilt weight, padding included."""
        return self.iL * self.jL * self.iC * self.jC * self.iR * self.jR

    @property
    def left_first(self) -> bool:
        """Whether rebuilding contracts left with central before right (the cheaper order)."""
        return self._rebuild_flops(left_first=True) <= self._rebuild_flops(left_first=False)

    def _rebuild_flops(self, left_first: bool) -> int:
        if left_first:
            half = self.iL * self.jL * self.a * self.iC * self.jC * self.b
        else:
            half = self.a * self.iC * self.jC * self.b * self.iR * self.jR
        return 2 * (half + self.weight_elements * (self.b if left_first else self.a))

    @property
    def rebuild_flops(self) -> int:
        """FLOPs of rebuilding one expert's weight in the cheaper order."""
        return self._rebuild_flops(self.left_first)

    @property
    def chain_flops_per_slot(self) -> int:
        """FLOPs of contracting one activation row with left, then central, then right."""
        left = self.iL * self.jL * self.a * self.iC * self.iR
        central = self.iR * self.jL * self.a * self.iC * self.jC * self.b
        right = self.jL * self.jC * self.b * self.iR * self.jR
        return 2 * (left + central + right)


def choose_strategy(dims: BlockDims, num_experts: int, num_slots: int, training: bool = False) -> str:
    """The strategy with the fewest FLOPs for ``num_slots`` rows over ``num_experts`` experts.

    ``training`` adds the backward pass: twice the forward for a chain; for a rebuild the second rebuild and the
    projection of the weight gradient onto the blocks (three GEMMs of the rebuild's size) per expert.
    """
    busy = min(num_experts, num_slots)
    rebuild = busy * dims.rebuild_flops * (5 if training else 1)
    dense = num_slots * 2 * dims.in_features * dims.out_features * (3 if training else 1)
    chain = num_slots * dims.chain_flops_per_slot * (3 if training else 1)
    if chain <= rebuild + dense:
        return "separable" if dims.is_separable else "chain"
    return "rebuild"


@dataclass(frozen=True)
class ContractionPlan:
    """A printable choice of strategy.

    Attributes:
        strategy: ``rebuild`` (one expert's weight at a time, then a GEMM), ``chain`` (contract activations with
            left, central, right) or ``separable`` (the chain of a separable shape, whose middle step is one dense
            GEMM for all experts).
        flops: of the strategy, forward, or forward and backward when training.
        dense_flops: of a dense layer on the same rows.
        temporary_bytes: largest temporary weight memory, in bytes.
        candidates: FLOPs of every strategy that was considered.
    """

    strategy: str
    flops: int
    dense_flops: int
    temporary_bytes: int
    candidates: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        lines = [
            f"{self.strategy}: {self.flops / 1e9:.3f} GFLOP ({self.flops / max(self.dense_flops, 1):.2f} x dense), "
            f"{self.temporary_bytes / 2**20:.2f} MiB of temporary weights"
        ]
        lines += [f"  {name}: {flops / 1e9:.3f} GFLOP" for name, flops in self.candidates if name != self.strategy]
        return "\n".join(lines)


def plan_contraction(
    shape: MPOShape,
    num_experts: int,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    top_k: int = 1,
    training: bool = False,
    mask_central: bool = False,
) -> ContractionPlan:
    """Choose how to contract ``num_tokens * top_k`` rows with ``num_experts`` experts of ``shape``.

    Args:
        shape: shape of the matrix.
        num_experts: experts sharing the central core.
        num_tokens: tokens T.
        dtype, device: reserved for the cost model; this version counts FLOPs only.
        top_k: experts per token.
        training: include the backward pass.
        mask_central: the central core's gradient is not needed (one projection GEMM less).

    Returns:
        A frozen, printable plan.

    Raises:
        TypeError, ValueError: a shape that is no `MPOShape`, counts that are not positive (tokens: negative).
    """
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    for name, value, least in (("num_experts", num_experts, 1), ("num_tokens", num_tokens, 0), ("top_k", top_k, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    d = shape.block_dims
    dims = BlockDims(**d, in_features=shape.in_features, out_features=shape.out_features)
    slots = num_tokens * top_k
    busy = min(num_experts, slots)
    strategy = choose_strategy(dims, num_experts, slots, training)
    chain_name = "separable" if dims.is_separable else "chain"
    projections = (4 if mask_central else 5) if training else 1
    dense = slots * 2 * dims.in_features * dims.out_features * (3 if training else 1)
    flops = {
        chain_name: slots * dims.chain_flops_per_slot * (3 if training else 1),
        "rebuild": busy * dims.rebuild_flops * projections + dense,
    }
    check_choice("strategy", strategy, flops)
    weight_bytes = dims.weight_elements * torch.empty((), dtype=dtype).element_size()
    return ContractionPlan(
        strategy=strategy,
        flops=flops[strategy],
        dense_flops=dense,
        temporary_bytes=2 * weight_bytes if strategy == "rebuild" else 0,
        candidates=tuple(flops.items()),
    )
