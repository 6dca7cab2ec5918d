"""Statistics to watch while training a mixture: the distribution of tokens over experts, and gradient norms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpoe.models.kept import kept_modules
from mpoe.models.report import mpo_modules
from mpoe.training.freezing import chain_parameters


@dataclass(frozen=True)
class ExpertLoad:
    """How evenly each layer's router distributed its tokens.

    All fields have one entry per layer; a layer that saw no token has None.
    """

    share: list[list[float] | None]  # [layers][E], sums to 1
    min_share: list[float | None]
    max_share: list[float | None]
    variation: list[float | None]  # coefficient of variation over experts: 0 = even, sqrt(E - 1) = one expert takes all
    entropy: list[float | None]  # relative to log E: 1 = even, 0 = one expert takes all

    @classmethod
    def from_counts(cls, counts: Tensor) -> ExpertLoad:
        """From tokens per expert, `counts [layers, E]` (integers)."""
        if counts.ndim != 2:
            raise ValueError(f"counts must be [layers, E]; got {tuple(counts.shape)}")
        share: list[list[float] | None] = []
        low: list[float | None] = []
        high: list[float | None] = []
        variation: list[float | None] = []
        entropy: list[float | None] = []
        experts = counts.shape[1]
        for row in counts.double().cpu():
            total = row.sum()
            if total == 0:
                share.append(None)
                for column in (low, high, variation, entropy):
                    column.append(None)
                continue
            p = row / total
            share.append([round(value, 6) for value in p.tolist()])
            low.append(p.min().item())
            high.append(p.max().item())
            variation.append((p.std(correction=0) * experts).item())
            entropy.append(float(-torch.xlogy(p, p).sum()) / math.log(experts) if experts > 1 else 1.0)
        return cls(share, low, high, variation, entropy)

    def summary(self) -> dict[str, float]:
        """Scalars for a log line: the worst layer's extremes, the layers' mean entropy and variation."""
        seen = [index for index, value in enumerate(self.entropy) if value is not None]
        if not seen:
            return {}

        def pick(column: list[float | None]) -> list[float]:
            return [value for value in column if value is not None]

        return {
            "expert_min_share": min(pick(self.min_share)),
            "expert_max_share": max(pick(self.max_share)),
            "expert_entropy": sum(pick(self.entropy)) / len(seen),
            "expert_variation": sum(pick(self.variation)) / len(seen),
        }


def core_grad_norms(model: nn.Module) -> dict[str, float]:
    """L2 norms of the gradients of all central and of all auxiliary cores; kinds without gradients are left out."""
    gradients: dict[str, list[Tensor]] = {"central": [], "auxiliary": []}
    for _, cores in mpo_modules(model):
        for index, parameter in enumerate(chain_parameters(cores)):
            if parameter.grad is not None:
                gradients["central" if index == cores.shape.central else "auxiliary"].append(parameter.grad.detach())
    for layer in kept_modules(model).values():
        for kind, parameters in (
            ("central", layer.central_parameters().values()),
            ("auxiliary", layer.experts.own_cores),
        ):
            gradients[kind] += [p.grad.detach() for p in parameters if p.grad is not None]
    return {
        f"grad_norm_{kind}": float(torch.nn.utils.get_total_norm(tensors))
        for kind, tensors in gradients.items()
        if tensors
    }
