"""Models whose experts stand between the projections of dense networks or beside them: their layers, and merging."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.layers.kept import KeptFeedForward
from mpoe.layers.neurons import NeuronFeedForward


def kept_modules(model: nn.Module) -> dict[str, KeptFeedForward]:
    """Every network of a model that kept its projections, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeptFeedForward)}


def hidden_modules(model: nn.Module) -> dict[str, HiddenFeedForward]:
    """Every `HiddenFeedForward` of a model by name."""
    return {name: module for name, module in kept_modules(model).items() if isinstance(module, HiddenFeedForward)}


def neuron_modules(model: nn.Module) -> dict[str, NeuronFeedForward]:
    """Every `NeuronFeedForward` of a model by name."""
    return {name: module for name, module in kept_modules(model).items() if isinstance(module, NeuronFeedForward)}


@torch.no_grad()
def fill_merged(merged: MPOEFeedForward, layer: HiddenFeedForward) -> None:
    """Set dense experts to the weights that the hidden-side blocks of ``layer`` are equivalent to."""
    if merged.router is not None and layer.router is not None:
        merged.router.load_state_dict(layer.router.state_dict())
    experts, dense = layer.experts, layer.projections()
    for kind, weights in merged.experts.projections().items():
        weights.weight.copy_(layer.expert_weights(kind))
        bias: Any = getattr(dense[kind], "bias", None)
        if weights.bias is not None:
            weights.bias.copy_(torch.zeros_like(weights.bias) if bias is None else bias)
        if weights.bias is not None and weights.bias.dim() == 2:  # before the experts' blocks
            weights.bias.copy_(layer.expert_weights(kind, weights.bias[:1])[:, 0])
            if experts.bias is not None and kind == ("gate_proj" if experts.is_gated else "up"):
                weights.bias.add_(experts.bias)


def set_mpoe_config(model: Any, config: MPOEConfig) -> None:
    """Put ``config`` into the configurations of a model and of its parts."""
    for holder in model.modules():
        if isinstance(getattr(holder, "config", None), type(model.config)):
            holder.config.mpoe = config.to_dict()


@torch.no_grad()
def merge_latent(model: Any) -> Any:
    """A copy whose experts read and write the model's own space: exact up to rounding.

    Every expert's weights become the products with the shared matrices P and Q, ``a_e <- P a_e``, ``b_e <- b_e Q``.

    Args:
        model: an MPOE model with ``MPOEConfig(shape="neurons", latent=l)``; it is not changed.

    Raises:
        TypeError: ``model`` is not an MPOE model.
        ValueError: a model without such experts.
    """
    if not hasattr(model, "mpoe_config"):
        raise TypeError(f"model must be an MPOE model with neurons (latent=l); got {type(model).__name__}")
    merged = copy.deepcopy(model)
    layers = [layer for layer in neuron_modules(merged).values() if layer.experts.latent is not None]
    if not layers:
        raise ValueError(f"model must have neurons in a latent space (latent=l); this {type(model).__name__} has none")
    for layer in layers:
        layer.experts = layer.experts.merged()
    set_mpoe_config(merged, dataclasses.replace(model.mpoe_config, latent=None))
    return merged
