"""What is measured on held-out data: the score, how the router works, how far apart the experts are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights
from mpoe.layers.hidden import HiddenFeedForward


@dataclass(frozen=True)
class Evaluation:
    """``score``: the field's measure; ``parts``: the score by domain or task; ``router``: `RouterCounts.summary`."""

    score: float
    parts: dict[str, float]
    router: dict[str, float] = field(default_factory=dict)


class RouterCounts:
    """Numbers of tokens per layer and expert, by domain or task."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, part: str, load: Tensor | None) -> None:
        """``load [layers, E]`` of one call; ``None`` (a dense model) counts nothing."""
        if load is not None:
            self._counts[part] = self._counts.get(part, 0) + load.double()

    def summary(self) -> dict[str, float]:
        """Means over layers; empty without a router.

        ``entropy``: of the experts' shares of all tokens, relative to log E (1 = even). ``specialisation``: how much
        the domain or task tells about the expert: their mutual information relative to log E, with equal weights for
        all domains (0 = nothing).
        """
        if not self._counts:
            return {}
        share = torch.stack([load / load.sum(-1, keepdim=True) for load in self._counts.values()])
        log_experts = math.log(share.shape[-1]) or 1.0
        of_all, of_each = _entropy(share.mean(0)), _entropy(share).mean(0)
        return {
            "entropy": float(of_all.mean()) / log_experts,
            "specialisation": float((of_all - of_each).mean()) / log_experts,
        }


def _entropy(share: Tensor) -> Tensor:
    return -torch.xlogy(share, share).sum(-1)


@torch.no_grad()
def expert_distance(model: nn.Module) -> float | None:
    """Mean over weights of RMS_e ||W_e - mean W|| / ||mean W||; ``None`` without several experts' weights."""
    distances = []
    for module in model.modules():
        found: list[Tensor] = []
        if isinstance(module, MPOCores | ExpertWeights):
            found = [module.dense_weights()]
        elif isinstance(module, HiddenFeedForward):
            found = [module.expert_weights(kind) for kind in module.projections()]
        for weights in found:
            if weights.shape[0] > 1:
                mean = weights.mean(0)
                spread = (weights - mean).square().sum((1, 2)).mean().sqrt()
                distances.append(float(spread / mean.norm()))
    return sum(distances) / len(distances) if distances else None
