"""Finds the existing experts of a Transformers model and turns them into MPO experts.

Nearly every mixture of Transformers 5 holds the weights of a layer's experts in two parameters, ``gate_up_proj
[E, 2F, I]`` and ``down_proj [E, I, F]``, and calls them with the router's choice: one adapter supports all of these.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.shapes import KINDS
from mpoe.layers.experts import MixtureExperts, check_activation
from mpoe.models.sites import EmbeddingSite, FFNSite, LinearSite, ModuleSite, Report
from mpoe.models.table import Family


def is_stock_experts(module: nn.Module) -> bool:
    """Whether ``module`` stores experts in the format of Transformers' mixtures."""
    held = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in held)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of every layer of a mixture, by name: Transformers' own, or their replacements."""
    for name, module in model.named_modules():
        if is_stock_experts(module) or isinstance(module, MixtureExperts):
            yield name, module


def router_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The routers: sibling modules of the experts with a router's name."""
    for name, _ in expert_modules(model):
        block = model.get_submodule(name.rpartition(".")[0])
        yield from (child for key, child in block.named_children() if key in ("gate", "router"))


def _why_not(module: Any) -> str | None:
    """Why experts cannot become MPO experts; ``None`` if they can."""
    others = sorted({name for name, _ in module.named_parameters()} - {"gate_up_proj", "down_proj"})
    if others:
        return f"they also hold {', '.join(others)}"
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate" or not getattr(module, "is_concatenated", True):
        return "they join gate and up in another way than act(gate) * up"
    experts, columns, rows = module.down_proj.shape[0], module.down_proj.shape[2], module.down_proj.shape[1]
    if getattr(module, "has_post_expert_norm", False) or module.gate_up_proj.shape != (experts, 2 * columns, rows):
        return (
            f"gate_up_proj must be [E, 2F, I] beside down_proj [E, I, F]; got {list(module.gate_up_proj.shape)} and "
            f"{list(module.down_proj.shape)}"
        )
    return None


@dataclass(frozen=True)
class ExpertsSite(ModuleSite):
    """The experts of one layer of a mixture, which become `MixtureExperts`.

    Attributes:
        options: keyword arguments of `MixtureExperts`.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def weights(self, kind: str) -> Tensor:
        """Weights ``[E, in, out]`` of one kind of projection."""
        if kind == "down":
            return self.dense.down_proj.transpose(1, 2)
        gate, up = self.dense.gate_up_proj.chunk(2, 1)
        return (up if kind == "up" else gate).transpose(1, 2)

    def check(self, config: MPOEConfig) -> None:
        """Refuse experts of another structure, or mismatched shapes."""
        reason = _why_not(self.dense)
        if reason is not None:
            raise ValueError(f"{self.name}: existing_experts must be 'keep' for these experts; {reason}")
        own = config.for_experts(self.name)
        if own.keeps_network:
            raise ValueError(
                f"{self.name}: shape {own.shape!r} needs one dense projection for all experts; those of a mixture "
                "differ"
            )
        for kind in KINDS:
            try:
                own.shape_for(kind, *self.weights(kind).shape[1:])
            except ValueError as error:
                raise ValueError(f"{self.name}.{kind}: {error}") from error

    def build(self, config: MPOEConfig) -> MixtureExperts:
        """`MixtureExperts` of these sizes, whose weights the caller fills or initialises."""
        own, down = config.for_experts(self.name), self.dense.down_proj
        shapes = {kind: own.shape_for(kind, *self.weights(kind).shape[1:]) for kind in KINDS}
        options = {"device": "meta", "dtype": down.dtype, "backend": config.backend, **self.options}
        return MixtureExperts(shapes, down.shape[0], **options).to_empty(device=down.device)

    def load(self, module: MixtureExperts, config: MPOEConfig) -> Report:
        """Fit the experts, and return the error of the fit."""
        return {
            f"{self.name}.{kind}": cores.load_weights_(self.weights(kind))
            for kind, cores in module.projections().items()
        }


AnySite = FFNSite | LinearSite | EmbeddingSite | ExpertsSite


def expert_sites(model: Any) -> Iterator[ExpertsSite]:
    """The experts of every layer of a mixture that can be converted.

    Raises:
        ValueError: an activation that experts cannot compute.
    """
    for name, module in model.named_modules():
        if is_stock_experts(module):
            number = re.search(r"(?:^|\.)(\d+)\.", name)
            options = {
                "activation": check_activation(model.config.hidden_act),
                "init_std": dict.fromkeys(KINDS, model.config.initializer_range),
            }
            yield ExpertsSite(name, int(number[1]) if number else None, module, options)


def checked_for(model: nn.Module, family: Family, config: MPOEConfig) -> MPOEConfig:
    """``config`` for this model: a mixture determines experts and router itself, and its numbers are filled in.

    Raises:
        ValueError: ``existing_experts`` for a model without experts; for a mixture a different number of experts, a
            router, or another kind of experts.
    """
    if not family.is_mixture:
        if config.existing_experts != "keep":
            raise ValueError(
                f"existing_experts is for models that are mixtures already; {type(model).__name__} has no experts"
            )
        return config
    experts: Any = next((module for _, module in expert_modules(model)), None)
    if experts is None:
        raise ValueError(f"{type(model).__name__} must have layers with experts; this one has none")
    config = config.with_cores()
    default, number = MPOEConfig(shape=config.shape), int(experts.down_proj.shape[0])
    for name in ("moe_type", "num_experts", "expert_type", "router"):
        value = getattr(config, name)
        if value != getattr(default, name) and (name, value) != ("num_experts", number):
            raise ValueError(
                f"{name} must be left out for {type(model).__name__}, which has {number} experts and a router of its "
                f"own; got {value!r}"
            )
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", 1)
    return dataclasses.replace(config, num_experts=number, router=RouterConfig(top_k=int(chosen)))


def stock_weights(experts: MixtureExperts) -> dict[str, nn.Parameter]:
    """The two parameters of Transformers' experts, computed from MPO experts."""
    weights = {kind: cores.dense_weights() for kind, cores in experts.projections().items()}
    joined = torch.cat([weights["gate_proj"], weights["up"]], -1).transpose(1, 2)
    values = {"gate_up_proj": joined, "down_proj": weights["down"].transpose(1, 2)}
    return {name: nn.Parameter(value.contiguous()) for name, value in values.items()}
