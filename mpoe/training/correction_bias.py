"""Balance without a loss: a bias of the routers' scores that only takes part in choosing experts.

Source: Wang et al., *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts* (arXiv 2408.15664),
algorithm 1; DeepSeek-V3 uses it (arXiv 2412.19437, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.models.report import routed_layers
from mpoe.training.statistics import expert_load_of


@torch.no_grad()
def update_correction_bias(model: nn.Module, expert_load: Tensor) -> None:
    """Raise ``e_score_correction_bias`` by the routers' ``bias_update_rate`` for experts with less than the mean load
    of their layer, and lower it for those with more. Routers without the bias are skipped.

    Call it once per optimizer step; `MPOETrainer` does.

    Args:
        model: an MPOE model.
        expert_load: tokens of every expert in the step, ``[layers, E]``, as in the model's outputs; summed over
            micro-batches and ranks.

    Raises:
        ValueError: a load of another size.
    """
    layers = [layer for _, layer in routed_layers(model)]
    if expert_load.dim() != 2 or len(expert_load) != len(layers):
        raise ValueError(f"expert_load must be [{len(layers)}, E], a row per layer; got {list(expert_load.shape)}")
    for layer, load in zip(layers, expert_load.float(), strict=True):
        router = layer.router
        if router is not None and router.e_score_correction_bias is not None:
            bias, rate = router.e_score_correction_bias, router.config.bias_update_rate
            bias.add_(torch.sign(load.mean() - load).to(bias), alpha=rate)


class CorrectionBias:
    """Collects a step's expert load from the outputs of its micro-batches, if a router needs it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._needed = any(
            layer.router is not None and layer.router.e_score_correction_bias is not None
            for _, layer in routed_layers(model)
        )
        self._load: Tensor | None = None

    def note(self, outputs: Any) -> None:
        """Add a micro-batch.

        Raises:
            ValueError: the load is needed, and the outputs do not have it.
        """
        if not self._needed:
            return
        load = expert_load_of(outputs)
        if load is None:
            raise ValueError("bias_update_rate needs the model's expert_load; output_router_logits is False")
        self._load = load if self._load is None else self._load + load

    def step(self, reduce: Callable[[Tensor, str], Tensor]) -> None:
        """Update the routers at the end of an optimizer step's backward passes; ``reduce`` sums over processes."""
        if self._load is not None:
            update_correction_bias(self._model, reduce(self._load, "sum"))
            self._load = None
