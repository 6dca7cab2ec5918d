"""What routers do: how decided they are for a token, and what explains the expert."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def mutual_information(classes: Tensor, chosen: Tensor, experts: int) -> float:
    """How much a token's class tells about its expert, relative to log E.

    Args:
        classes: int64 ``[T]``.
        chosen: experts of every token, int64 ``[T, K]``.
        experts: E.
    """
    counts = torch.zeros(int(classes.max()) + 1, experts, dtype=torch.double)
    index = classes[:, None].expand_as(chosen).reshape(-1), chosen.reshape(-1)
    counts.index_put_(index, torch.ones(chosen.numel(), dtype=torch.double), accumulate=True)
    share = counts / counts.sum()
    expected = share.sum(1, keepdim=True) * share.sum(0)
    return float(torch.xlogy(share, share / expected.clamp_min(1e-300)).sum()) / (math.log(experts) or 1.0)


def router_facts(logits: Sequence[Sequence[Tensor]], top_k: int, tokens: Tensor, domains: Tensor) -> dict[str, float]:
    """Means over layers.

    Args:
        logits: per call and layer ``[T, E]``.
        top_k: experts per token.
        tokens, domains: of all calls' tokens, int64 ``[T]``.

    Returns:
        ``entropy`` of a token's probabilities relative to log E (0: decided, 1: undecided), and ``mass`` of the chosen
        ones; ``token`` and ``domain``: how much the byte and the domain tell about the expert (`mutual_information`,
        less that of shuffled classes, which only measures how few tokens there are); ``use``: entropy of the experts'
        shares of all tokens, relative to log E.
    """
    facts = dict.fromkeys(("entropy", "mass", "token", "domain", "use"), 0.0)
    shuffled = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    for layer in zip(*logits, strict=True):
        scores = torch.cat(list(layer)).double().softmax(-1)
        experts = scores.shape[1]
        mass, chosen = scores.topk(top_k, -1)
        share = torch.bincount(chosen.reshape(-1), minlength=experts) / chosen.numel()
        found = {
            "entropy": float(-torch.xlogy(scores, scores).sum(-1).mean()) / math.log(experts),
            "mass": float(mass.sum(-1).mean()),
            "use": float(-torch.xlogy(share, share).sum()) / math.log(experts),
        }
        for name, classes in (("token", tokens), ("domain", domains)):
            by_chance = mutual_information(classes[shuffled], chosen, experts)
            found[name] = mutual_information(classes, chosen, experts) - by_chance
        for name, value in found.items():
            facts[name] += value / len(logits[0])
    return {name: round(value, 4) for name, value in facts.items()}
