"""Networks with experts of their own hidden neurons beside them, and the merging of a latent space into the neurons."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers.neurons import START_NOISE, NeuronFeedForward
from mpoe.models.kept import KeptSite
from mpoe.models.sites import Report, set_module


@dataclass(frozen=True)
class NeuronSite(KeptSite):
    """A network that becomes a `NeuronFeedForward`."""

    shape: ClassVar[str] = "neurons"

    @property
    def place(self) -> str:
        return self.sums or self.name

    @property
    def obstacle(self) -> str | None:
        needed = ["down"] if self.sums else list(self.dense)
        missing = [kind for kind in needed if "." in self.inside.get(kind, ".")]
        return f"its {missing[0]} projection inside the module" if missing else None

    def build(self, config: MPOEConfig) -> NeuronFeedForward:  # type: ignore[override]
        own, stds = self.options, self.options.get("init_std", {})
        made: NeuronFeedForward = self._layer(
            NeuronFeedForward,
            config,
            gated=own["gated"],
            bias=own["bias"],
            adds_input=bool(self.sums),
            init_std=stds.get("up"),
        )
        return made

    def load(self, module: NeuronFeedForward, config: MPOEConfig) -> Report:  # type: ignore[override]
        """A new router; neurons that contribute nothing yet: copies of dense ones, or random ones in a latent space."""
        if module.router is not None:
            module.router.reset_parameters()
        experts, weights = module.experts, {kind: self.weight(kind) for kind in self.dense if kind != "down"}
        experts.init_std = float(weights["up"].float().std())
        experts.reset_parameters()
        if experts.latent is None:
            experts.copy_neurons_(weights, self.bias("up"), config.auxiliary_noise or START_NOISE)
        return {}

    def install(self, model: nn.Module, module: NeuronFeedForward, config: MPOEConfig) -> None:  # type: ignore[override]
        dense = model.get_submodule(self.place)
        if self.sums:
            module.output_dropout = getattr(getattr(dense, "dropout", None), "p", 0.0)
        module.train(model.training)
        module.around(dense, self.dense)
        set_module(model, self.place, module)
        self.zero(model)


def neuron_modules(model: nn.Module) -> dict[str, NeuronFeedForward]:
    """Every `NeuronFeedForward` of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NeuronFeedForward)}


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
    config = dataclasses.replace(model.mpoe_config, latent=None).to_dict()
    for holder in merged.modules():
        if isinstance(getattr(holder, "config", None), type(merged.config)):
            holder.config.mpoe = config
    return merged
