"""What each expert of a composed mixture is worth on texts: its tokens, and the losses without it and with it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpoe.models.domains import forced, routed_layers, without
from mpoe.models.expert_mixture import NONE
from mpoe.models.expert_router import Statistics, router_weight

IGNORED = -100
Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Worth:
    """Losses in nats per token.

    Attributes:
        names: of the experts.
        tokens: that were predicted.
        loss: of the mixture.
        oracle: if every token had the expert that predicts it best, in all layers alike.
        share: of the router's choices, over all layers, by expert.
        alone: the loss if every token goes to this expert; *none* is the base.
        removed: the loss of the mixture composed without this expert.
        best: by token that is predicted, in order, the expert that predicts it best.
    """

    names: list[str]
    tokens: int
    loss: float
    oracle: float
    share: list[float]
    alone: list[float]
    removed: list[float]
    best: list[int]

    @property
    def base(self) -> float | None:
        """The loss of the base, if the mixture has *none*."""
        return self.alone[self.names.index(NONE)] if NONE in self.names else None


@torch.inference_mode()
def token_losses(model: Any, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Losses in nats of the tokens that ``labels`` name, in order: those of decoders are predicted one place before.

    Raises:
        ValueError: batches without labels, or none that counts.
    """
    found, device = [], next(model.parameters()).device
    for batch in batches:
        if "labels" not in batch:
            raise ValueError(f"batches must hold labels; got {', '.join(batch)}")
        moved = {name: value.to(device) for name, value in batch.items()}
        logits, labels = model(**moved).logits.float(), moved["labels"]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        found.append(F.cross_entropy(logits[counted], labels[counted], reduction="none"))
    if not sum(map(len, found)):
        raise ValueError("batches must hold tokens to predict; got none")
    return torch.cat(found)


def composed_worth(mixture: Any, classes: Sequence[Statistics], batches: Batches) -> Worth:
    """Compare a composed mixture with each of its experts alone and with the mixtures that lack one.

    Args:
        mixture: see `mpoe.compose_experts`; in eval mode.
        classes: the statistics of its experts in order, then those of the background if it has *none*.
        batches: texts as keyword arguments of the model, with ``labels``.

    Raises:
        ValueError: a model that was not composed, fewer than two experts, statistics of another number of them, batches
            without labels.
    """
    names = list(getattr(mixture.config, "mpoe_experts", None) or [])
    if len(names) < 2 or len(classes) != len(names):
        raise ValueError(
            f"mixture must be composed of at least two experts with *none*, each with statistics; it has {names}, "
            f"statistics are of {len(classes)}"
        )
    own = token_losses(mixture, batches)
    with torch.inference_mode():
        loads = torch.stack([mixture(**batch).expert_load.sum(0) for batch in batches]).sum(0)
    alone, removed = [], []
    for number in range(len(names)):
        with forced(mixture, number):
            alone.append(token_losses(mixture, batches))
        others = [each for place, each in enumerate(classes) if place != number]
        with without(mixture, number, {layer: router_weight(others, layer) for layer in routed_layers(mixture)}):
            removed.append(float(token_losses(mixture, batches).mean()))
    best = torch.stack(alone).min(0)
    return Worth(
        names,
        len(own),
        float(own.mean()),
        float(best.values.mean()),
        (loads / loads.sum()).tolist(),
        [float(each.mean()) for each in alone],
        removed,
        best.indices.tolist(),
    )
