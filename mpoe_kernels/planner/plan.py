"""What to compute: the strategy for contracting x with the blocks, forward and backward, from shapes alone.

A pure function of sizes: it knows no backends, runs no tensor ops and waits for no device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpoe_kernels.mpo.shape import MPOShape
from mpoe_kernels.planner.contraction import Contraction, candidate_strategies, contraction, contractions
from mpoe_kernels.planner.device import hardware_of
from mpoe_kernels.planner.explain import (
    Loss,
    describe_phase,
    dtype_name,
    format_bytes,
    format_flops,
    format_seconds,
    lost_on_memory,
    lost_on_saving,
    lost_on_time,
)
from mpoe_kernels.planner.hardware import Hardware
from mpoe_kernels.planner.orders import STRATEGIES, BlockDims
from mpoe_kernels.planner.program import ALL_GRADIENTS

__all__ = ["STRATEGIES", "BlockDims", "ContractionPlan", "plan_contraction"]


@dataclass(frozen=True)
class ContractionPlan:
    """A printable choice of strategy.

    Attributes:
        shape, num_experts, num_tokens, top_k, dtype, training, mask_central: the arguments.
        hardware: whose numbers predict the times.
        forward: the chosen contraction of the forward pass.
        backward: of the backward pass, chosen independently; ``None`` unless training.
        losses: every other strategy, and why it lost; forward then backward.
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
    losses: tuple[Loss, ...]
    dense_flops: int

    @property
    def phases(self) -> tuple[Contraction, ...]:
        """Forward, and backward when training."""
        return (self.forward,) if self.backward is None else (self.forward, self.backward)

    @property
    def strategy(self) -> str:
        """The forward strategy."""
        return self.forward.strategy

    @property
    def backward_strategy(self) -> str | None:
        """The backward strategy; ``None`` unless training."""
        return None if self.backward is None else self.backward.strategy

    @property
    def flops(self) -> int:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> int:
        """Read and written by all steps, cache included."""
        return sum(phase.bytes for phase in self.phases)

    @property
    def memory_bytes(self) -> int:
        """The part of ``bytes`` that crosses to and from memory."""
        return sum(phase.memory_bytes(self.hardware) for phase in self.phases)

    @property
    def temporary_bytes(self) -> int:
        """Largest weight memory alive at once besides the blocks: never above two experts' weights."""
        return max(phase.temporary_bytes for phase in self.phases)

    @property
    def seconds(self) -> float:
        """Predicted time."""
        return sum(phase.seconds(self.hardware) for phase in self.phases)

    @property
    def x_dense(self) -> float:
        """FLOPs over a dense layer's on the same rows (0 without rows)."""
        return self.flops / self.dense_flops if self.dense_flops else 0.0

    @property
    def intensity(self) -> float:
        """FLOPs per byte to and from memory (0 without rows)."""
        return self.flops / self.memory_bytes if self.memory_bytes else 0.0

    def explain(self) -> str:
        """What was chosen, the numbers of all candidates, and one line for every loser."""
        what = "forward and backward" if self.training else "forward"
        masked = ", central gradient masked" if self.training and self.mask_central else ""
        size = f"{self.shape.in_features} x {self.shape.out_features}, {dtype_name(self.dtype)}"
        experts = f"{self.num_experts:,} experts ({self.forward.busy_experts:,} expected busy)"
        ridge = self.hardware.ridge(self.dtype)
        lines = [
            f"{size}; {experts}, {self.num_tokens:,} tokens x top-{self.top_k}; {what}{masked}",
            f"on {self.hardware.name}, where memory bounds what does less than {ridge:.3g} FLOP for each of its bytes",
            f"in all {format_flops(self.flops)} ({self.x_dense:.3g} x dense), {format_bytes(self.bytes)} moved, "
            f"{format_bytes(self.temporary_bytes)} of temporary weights, predicted {format_seconds(self.seconds)}",
        ]
        for phase in self.phases:
            share = self.dense_flops
            if self.training:
                share = self.dense_flops // 3 * (1 if phase.phase == "forward" else 2)
            losses = [loss for loss in self.losses if loss.contraction.phase == phase.phase]
            lines += describe_phase(phase, losses, self.hardware, share)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.explain()


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__} {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _choose(
    dims: BlockDims,
    num_experts: int,
    slots: int,
    dtype: torch.dtype,
    phase: str,
    mask_central: bool,
    hardware: Hardware,
    saves: bool,
) -> tuple[Contraction, list[Loss]]:
    """The fastest candidate of a phase, and why each of the others lost."""
    sizes = (dims, num_experts, slots, dtype, phase, ALL_GRADIENTS, mask_central)
    found = contractions(*sizes)
    if saves:
        best = next(c for c in found if c.strategy == "separable")
    else:
        best = min(found, key=lambda c: c.seconds(hardware))
    losses = []
    for strategy in candidate_strategies(dims):
        if strategy == best.strategy:
            continue
        loser = contraction(strategy, *sizes)
        if loser not in found:
            losses.append(lost_on_memory(loser, hardware))
        elif loser.seconds(hardware) < best.seconds(hardware):
            losses.append(lost_on_saving(loser, best, hardware))
        else:
            losses.append(lost_on_time(loser, best, hardware))
    return best, sorted(losses, key=lambda loss: loss.seconds)


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

    The ops choose among the same candidates whenever they run, in compiled graphs too: there they are opaque operators,
    so one graph serves any number of rows. This function shows the choice; it is plain Python, for use outside graphs.

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
        TypeError, ValueError: a shape that is no `MPOShape`, counts that are not positive integers (tokens: negative),
            a dtype without GEMMs, an unknown device (the message lists the known ones).
    """
    if not isinstance(shape, MPOShape):
        raise TypeError(f"shape must be an MPOShape; got {type(shape).__name__}")
    for name, value, least in (("num_experts", num_experts, 1), ("num_tokens", num_tokens, 0), ("top_k", top_k, 1)):
        _check_count(name, value, least)
    hardware = hardware_of(device)
    hardware.flops_per_second(dtype)  # refuses other dtypes
    dims = BlockDims.of_shape(shape)
    slots = num_tokens * top_k
    # When gradients are wanted, the ops run a separable shape's forward so that its central step's result is saved.
    saves = training and dims.is_separable
    forward, losses = _choose(dims, num_experts, slots, dtype, "forward", mask_central, hardware, saves)
    backward = None
    if training:
        backward, more = _choose(dims, num_experts, slots, dtype, "backward", mask_central, hardware, False)
        losses += more
    return ContractionPlan(
        shape=shape,
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        dtype=dtype,
        training=training,
        mask_central=mask_central,
        hardware=hardware,
        forward=forward,
        backward=backward,
        losses=tuple(losses),
        dense_flops=slots * dims.dense_flops_per_slot * (3 if training else 1),
    )
