"""Feed-forward networks that keep their projections: experts with hidden-side blocks are inserted between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.layers.experts import DenseExperts
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.models.sites import FFNSite, Report, set_module


@dataclass(frozen=True)
class HiddenSite(FFNSite):
    """A dense feed-forward network, which becomes a `HiddenFeedForward` around its own projections."""

    @classmethod
    def of(cls, site: FFNSite) -> HiddenSite:
        """The same network, to be converted in this way."""
        return cls(**{f.name: getattr(site, f.name) for f in dataclasses.fields(site)})

    @property
    def replaced(self) -> list[nn.Module]:
        return []

    @property
    def inside(self) -> dict[str, str]:
        """Attribute name of each projection inside the replaced module."""
        start = f"{self.name}."
        return {kind: prefix.removeprefix(start) for kind, prefix in self.prefixes.items() if prefix.startswith(start)}

    @property
    def obstacle(self) -> str | None:
        """Why blocks cannot be inserted between these projections, if they cannot."""
        missing = [kind for kind in self.dense if kind != "down" and "." in self.inside.get(kind, ".")]
        return f"its {missing[0]} projection inside the module" if missing else None

    def check(self, config: MPOEConfig) -> None:
        """Refuse projections of another structure or with mismatched sizes."""
        own = config.for_experts(self.name)
        if self.obstacle is not None:
            raise ValueError(f"{self.name}: shape 'hidden' needs {self.obstacle} (shape='separable' supports it)")
        rows, columns = self.weight("up").shape
        for kind, (i, f) in {"up": (rows, columns), "gate_proj": (rows, columns), "down": (columns, rows)}.items():
            if kind in self.dense and tuple(self.weight(kind).shape) != (i, f):
                raise ValueError(
                    f"{self.prefixes[kind]} must be for a weight [{i}, {f}]; got {list(self.weight(kind).shape)}"
                )
        try:
            own.hidden_block(columns)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error

    def build(self, config: MPOEConfig) -> HiddenFeedForward:  # type: ignore[override]
        up = self.weight("up")
        rows, columns = up.shape
        options = {key: self.options[key] for key in ("activation", "dropout", "output_dropout")}
        return HiddenFeedForward(
            rows,
            columns,
            config.for_experts(self.name),
            names=self.inside,
            columns=self.columns,
            stream=self.stream,
            device="meta",
            dtype=up.dtype,
            **options,
        ).to_empty(device=up.device)

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
