"""How a model's parameters grow with the number of experts: MPO experts, and full weights as in Switch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import MPOEFeedForward, RoutedFeedForward
from mpoe.layers.kept import KeptFeedForward
from mpoe.models.report import parameter_report

EXPERTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Growth:
    """Total parameters by number of experts.

    Attributes:
        experts: numbers of experts E, ascending.
        mpoe: with MPO experts that share their central cores; empty for a model with dense experts.
        switch: with E full weights.
        dense: of the dense model.
    """

    experts: list[int]
    mpoe: list[int]
    switch: list[int]
    dense: int


def parameter_growth(model: nn.Module, experts: Sequence[int] = EXPERTS) -> Growth:
    """Totals of an MPOE model with other numbers of experts; the model's own is added to ``experts``.

    Raises:
        ValueError: a model without mixtures.
    """
    layers = [module for module in model.modules() if isinstance(module, RoutedFeedForward)]
    if not layers:
        raise ValueError(f"parameter_growth needs a model with mixtures of experts; {type(model).__name__} has none")
    own = layers[0].num_experts
    grouped = [layer for layer in layers if isinstance(layer, MPOEFeedForward)]
    kept = [layer for layer in layers if isinstance(layer, KeptFeedForward)]
    projections = [projection for layer in grouped for projection in layer.experts.projections().values()]
    full = sum(projection.in_features * projection.out_features for projection in projections)
    full += sum(weight.numel() for layer in kept for weight in layer.dense_parameters().values())
    router = sum(layer.router.in_features for layer in layers if layer.router is not None)
    cores = [projection for projection in projections if isinstance(projection, MPOCores)]
    auxiliary = sum(core.numel() for chain in cores for core in chain.auxiliary) // own
    auxiliary += sum(layer.own_parameters() for layer in kept) // own
    report = parameter_report(model)
    counts = sorted({*experts, own})
    return Growth(
        counts,
        [report["total"] + (count - own) * (auxiliary + router) for count in counts] if cores or kept else [],
        [report["switch_total"] + (count - own) * (full + router) for count in counts],
        report["dense_total"],
    )
