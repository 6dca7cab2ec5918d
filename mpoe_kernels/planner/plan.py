"""What to compute: the strategy for contracting x with the blocks, forward and backward, from shapes alone.

A pure function of sizes: it knows no backend, runs no tensor op and waits for no device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.planner.contraction import ALL_GRADIENTS, Contraction, contractions
from mpoe_kernels.planner.hardware import Hardware, hardware_of
from mpoe_kernels.planner.orders import STRATEGIES, BlockDims

__all__ = ["STRATEGIES", "BlockDims", "ContractionPlan", "plan_contraction"]


@dataclass(frozen=True)
class ContractionPlan:
    """A printable choice of strategy.

    Attributes:
        shape, num_experts, num_tokens, top_k, dtype, training, mask_central: what was asked.
        hardware: whose numbers predict the times.
        forward: the chosen contraction of the forward pass.
        backward: of the backward pass, chosen independently; ``None`` unless training.
        candidates: every contraction that was considered, with its predicted seconds, forward then backward.
        dense_flops: of a dense layer on the same rows, forward, or forward and backward when training.
    """

    shape: MPOShape
    num_experts: int
    num_tokens: int
    top_k: int
    dtype: torch.dtype
    training: bool
    mask_central: bool
    hardware: Hardware
    forward: Contraction
    backward: Contraction | None
    candidates: tuple[tuple[Contraction, float], ...]
    dense_flops: int

    @property
    def phases(self) -> tuple[Contraction, ...]:
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def strategy(self) -> str:
        """The forward strategy."""
        return self.forward.strategy

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> int:
        return sum(phase.bytes for phase in self.phases)

    @property
    def temporary_bytes(self) -> int:
        """Largest weight memory alive at once besides the blocks: never above two experts' weights."""
        return max(phase.temporary_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        return sum(phase.seconds(self.hardware) for phase in self.phases)

    @property
    def x_dense(self) -> float:
        """FLOPs over a dense layer's on the same rows (0 without rows)."""
        return self.flops / self.dense_flops if self.dense_flops else 0.0

    @property
    def intensity(self) -> float:
        """FLOPs per byte (0 without rows)."""
        return self.flops / self.bytes if self.bytes else 0.0

    def __str__(self) -> str:
        lines = []
        for phase in self.phases:
            lines.append(f"{phase.phase}: {phase.strategy}, {phase.flops / 1e9:.3f} GFLOP")
            lines += [
                f"  {other.strategy}: {other.flops / 1e9:.3f} GFLOP, {1e3 * seconds:.3f} ms"
                for other, seconds in self.candidates
                if other.phase == phase.phase and other.strategy != phase.strategy
            ]
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
        num_tokens: tokens T, may be zero.
        dtype: of activations and cores.
        device: whose numbers predict the times: ``"cpu"``, a torch device, or a name of the hardware table.
        top_k: experts per token.
        training: include the backward pass.
        mask_central: the central core's gradient is not needed.

    Returns:
        A frozen, printable plan.

    Raises:
        TypeError, ValueError: a shape that is no `MPOShape`, counts that are not positive (tokens: negative), an
            unknown device.
    """
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    for name, value, least in (("num_experts", num_experts, 1), ("num_tokens", num_tokens, 0), ("top_k", top_k, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    hardware = hardware_of(device)
    dims = BlockDims(**shape.block_dims, in_features=shape.in_features, out_features=shape.out_features)
    slots = num_tokens * top_k
    chosen, candidates = [], []
    for phase in ("forward", "backward") if training else ("forward",):
        found = contractions(dims, num_experts, slots, dtype, phase, ALL_GRADIENTS, mask_central)
        timed = [(c, c.seconds(hardware)) for c in found]
        # A separable forward that saves its central step's result is what the ops run when gradients are wanted.
        pool = [t for t in timed if t[0].strategy == "separable"] if training and phase == "forward" else []
        chosen.append(min(pool or timed, key=lambda t: t[1])[0])
        candidates += timed
    return ContractionPlan(
        shape=shape,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        dtype=dtype,
        training=training,
        mask_central=mask_central,
        hardware=hardware,
        forward=chosen[0],
        backward=chosen[1] if training else None,
        candidates=tuple(candidates),
        dense_flops=slots * dims.dense_flops_per_slot * (3 if training else 1),
    )
