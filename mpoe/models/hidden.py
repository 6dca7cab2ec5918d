"""Networks with hidden-side experts, which are inserted between the projections, and their merging."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers.experts import DenseExperts
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.models.kept import KeptSite
from mpoe.models.sites import Report, set_module


@dataclass(frozen=True)
class HiddenSite(KeptSite):
    """A network that becomes a `HiddenFeedForward`."""

    shape: ClassVar[str] = "hidden"

    @property
    def obstacle(self) -> str | None:
        missing = [kind for kind in self.dense if kind != "down" and "." in self.inside.get(kind, ".")]
        return f"its {missing[0]} projection inside the module" if missing else None

    def check(self, config: MPOEConfig) -> None:
        super().check(config)
        try:
            config.for_experts(self.name).hidden_block(self.weight("up").shape[1])
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def build(self, config: MPOEConfig) -> HiddenFeedForward:  # type: ignore[override]
        made: HiddenFeedForward = self._layer(HiddenFeedForward, config, dropout=self.options["dropout"])
        return made

    def load(self, module: HiddenFeedForward, config: MPOEConfig) -> Report:  # type: ignore[override]
        """A new router and identity blocks: nothing is decomposed."""
        if module.router is not None:
            module.router.reset_parameters()
        module.experts.reset_parameters()
        if config.auxiliary_noise:
            module.experts.add_noise_(config.auxiliary_noise)
        return {}

    def install(self, model: nn.Module, module: HiddenFeedForward, config: MPOEConfig) -> None:  # type: ignore[override]
        module.train(model.training)
        module.adopt(self.dense)
        set_module(model, self.name, module)
        self.zero(model)


def hidden_modules(model: nn.Module) -> dict[str, HiddenFeedForward]:
    """Every `HiddenFeedForward` of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HiddenFeedForward)}


def merged_config(config: MPOEConfig, layers: dict[str, HiddenFeedForward]) -> MPOEConfig:
    """Configuration of the dense experts that such layers merge into.

    A bias before the activation passes through an expert's block, so every expert gets its own bias.
    """
    own = any(
        module.experts.bias is not None or getattr(module.projections()["up"], "bias", None) is not None
        for module in layers.values()
    )
    return dataclasses.replace(config, expert_type="dense", expert_bias=own, rate_ratios={})


@torch.no_grad()
def fill_merged(merged: MPOEFeedForward, layer: HiddenFeedForward) -> None:
    """Set dense experts to the weights that the hidden-side blocks of ``layer`` are equivalent to."""
    assert isinstance(merged.experts, DenseExperts)
    if merged.router is not None and layer.router is not None:
        merged.router.load_state_dict(layer.router.state_dict())
    experts, dense = layer.experts, layer.projections()
    for kind, weights in merged.experts.projections().items():
        weights.weight.copy_(layer.expert_weights(kind))
        if weights.bias is None:
            continue
        value: Any = getattr(dense[kind], "bias", None)
        value = weights.bias.new_zeros(weights.out_features) if value is None else value
        if weights.bias.dim() == 2:  # before the experts' blocks
            core = experts.auxiliary["right" if kind == "up" else "right_gate"]
            groups = layer.hidden_features // experts.block_size
            own = core.expand(-1, groups, -1, -1)
            value = torch.einsum("ga,egab->egb", value.to(core.dtype).view(groups, -1), own).flatten(1)
            before_activation = kind == ("gate_proj" if experts.is_gated else "up")
            value = value if experts.bias is None or not before_activation else value + experts.bias
        weights.bias.copy_(value)
