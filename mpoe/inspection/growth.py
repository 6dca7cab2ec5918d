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
    own, cores, full, auxiliary = layers[0].num_experts, False, 0, 0
    for layer in layers:
        if isinstance(layer, KeptFeedForward):
            cores, auxiliary = True, auxiliary + layer.own_parameters() // own
            full += sum(weight.numel() for weight in layer.dense_parameters().values())
        elif isinstance(layer, MPOEFeedForward):
            for projection in layer.experts.projections().values():
                full += projection.in_features * projection.out_features
                if isinstance(projection, MPOCores):
                    cores, auxiliary = True, auxiliary + sum(core.numel() for core in projection.auxiliary) // own
    router = sum(layer.router.in_features for layer in layers if layer.router is not None)
    report, counts = parameter_report(model), sorted({*experts, own})
    mpoe = [report["total"] + (count - own) * (auxiliary + router) for count in counts] if cores else []
    switch = [report["switch_total"] + (count - own) * (full + router) for count in counts]
    return Growth(counts, mpoe, switch, report["dense_total"])
