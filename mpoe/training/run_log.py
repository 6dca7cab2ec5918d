"""What a run logs of its steps: losses, and the distribution of tokens over experts."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Sums or averages a tensor over all processes, as `Accelerator.reduce` does.
Reduce = Callable[[Tensor, str], Tensor]


class RunLog:
    """Task loss, auxiliary loss and expert load since the last `pop`.

    Everything stays on the device until then, without synchronisation.
    """

    def __init__(self) -> None:
        self._steps = 0.0
        self._sums: dict[str, Any] = {}
        self._load: Tensor | None = None

    def note(
        self, task: Tensor, auxiliary: Tensor | None, load: Tensor | None, micro_batches: int
    ) -> None:
        """Add one of a step's ``micro_batches``; ``load`` `[layers, E]` counts tokens per
        expert."""
        self._steps += 1 / micro_batches
        for name, loss in (("aux_loss", auxiliary), ("task_loss", task)):
            if loss is not None:
                share = loss.detach().float() / micro_batches
                self._sums[name] = self._sums.get(name, 0.0) + share
        if load is not None:
            load = load.detach().long()
            self._load = load if self._load is None else self._load + load

    def pop(self, reduce: Reduce) -> tuple[dict[str, float], Tensor | None]:
        """Means per step by name, and tokens per expert ``[layers, E]`` (None: no mixture); then
        resets. Over all processes, which must all call it.
        """
        means = {
            name: float(reduce(total, "mean")) / self._steps for name, total in self._sums.items()
        }
        counts = None if self._load is None else reduce(self._load, "sum")
        self._steps = 0.0
        self._sums = {}
        self._load = None
        return means, counts


def load_shares(counts: Tensor) -> list[list[float] | None]:
    """``[layers][E]``: every expert's share of its layer's tokens; None for a layer that saw no
    token.

    Args:
        counts: tokens per expert, integers ``[layers, E]``.
    """
    return [
        [round(share, 6) for share in (row / row.sum()).tolist()] if row.any() else None
        for row in counts.double().cpu()
    ]


def load_summary(counts: Tensor) -> dict[str, float]:
    """Scalars for a log line of tokens per expert ``[layers, E]``: the worst layer's extremes, and
    the layers' mean
    entropy (relative to log E: 1 = even, 0 = one expert takes all). Layers that saw no token are
    left out."""
    rows = counts.double().cpu()
    share = rows[rows.sum(1) > 0]
    if not len(share):
        return {}
    share = share / share.sum(1, keepdim=True)
    experts = share.shape[1]
    entropy = -float(torch.xlogy(share, share).sum(1).mean())
    return {
        "expert_min_share": float(share.min()),
        "expert_max_share": float(share.max()),
        "expert_entropy": entropy / math.log(experts) if experts > 1 else 1.0,
    }


def one_sided(counts: Tensor, top_k: int) -> str | None:
    """A sentence if, of slots per expert ``[layers, E]`` where a token has ``top_k``, one got more
    of a layer's tokens than half plus half of the even share: of 2 experts 75%, of 8 56%, of 8 with
    ``top_k`` 2 63%."""
    slots = counts.sum(1)
    experts = counts.shape[1]
    share = (top_k * counts.max(1).values / slots.clamp(min=1)).clamp(max=1)
    layer = int(share.argmax())
    if (
        slots[layer] < 100 * experts or share[layer] <= 0.5 + 0.5 * top_k / experts
    ):  # few may be chance
        return None
    return (
        f"expert {int(counts[layer].argmax())} of mixture layer {layer} took {share[layer]:.0%} of "
        "its tokens since the last log; balance_loss_weight, jitter or a lower router_lr_scale "
        "spread them"
    )
