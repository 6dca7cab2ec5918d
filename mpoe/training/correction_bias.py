"""Balance of experts without a loss: the bias of the choice follows the load."""

from typing import Any

import torch
from torch import Tensor, nn

from mpoe.models.walk import routed_layers


@torch.no_grad()
def update_correction_bias(model: nn.Module, expert_load: Tensor) -> None:
    """Raise ``e_score_correction_bias`` by the routers' ``bias_update_rate`` for experts with less
    than the mean load of their layer, and lower it for those with more. Routers without the bias
    are skipped.

    Balance without a loss: the bias only takes part in choosing experts (Wang et al.,
    *Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts*, arXiv 2408.15664,
    algorithm 1; DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    Call it once per optimizer step; `MPOETrainer` does.

    Args:
        model: an MPOE model.
        expert_load: tokens of every expert in the step, ``[layers, E]``, as in the model's outputs;
            summed over micro-batches and ranks.

    Raises:
        ValueError: a load of another size.
    """
    routers = _routers(model)
    if tuple(expert_load.shape) not in {(len(routers), router.num_experts) for router in routers}:
        raise ValueError(
            f"expert_load must be [{len(routers)}, E], a row per layer; got "
            f"{list(expert_load.shape)}"
        )
    for router, load in zip(routers, expert_load.float(), strict=True):
        bias = router.e_score_correction_bias
        if bias is not None:
            rate = router.config.bias_update_rate
            bias.add_(torch.sign(load.mean() - load).to(bias), alpha=rate)


def corrects_bias(model: nn.Module) -> bool:
    """Whether a router of ``model`` needs `update_correction_bias`."""
    return any(router.e_score_correction_bias is not None for router in _routers(model))


def _routers(model: nn.Module) -> list[Any]:
    return [layer.router for _, layer in routed_layers(model)]
