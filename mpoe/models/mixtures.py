"""Models that are mixtures before conversion: how they differ from converted dense models, and how to restore them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from mpoe.layers.experts import MixtureExperts
from mpoe.models.base import MPOEModelMixin
from mpoe.models.sites import set_module
from mpoe.models.stock_experts import expert_modules, router_modules, stock_weights


class MixtureMixin(MPOEModelMixin):
    """A mixture of Transformers. Router, auxiliary loss and outputs are those of its own class."""

    # Its routers may have a dtype of their own.
    _keep_in_fp32_modules_strict = []  # noqa: RUF012 - declared so by Transformers

    def _routed_forward(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return forward(*args, **kwargs)

    has_stock_experts: ClassVar[bool] = True

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return bool(cls.dense_class._can_set_experts_implementation())

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """As in Transformers: its experts support more implementations than ours."""
        return str(PreTrainedModel.get_correct_experts_implementation(self, requested_experts))

    def forget_dense_names(self) -> None:
        """As for every model; if experts are MPOs, plans replicate experts and routers on every rank."""
        super().forget_dense_names()
        model: Any = self
        changed = [name for name, module in expert_modules(model) if isinstance(module, MixtureExperts)]
        if changed:
            ends = {name.rpartition(".")[2] for name in changed}
            model._ep_plan = {}
            model._tp_plan = {key: how for key, how in model._tp_plan.items() if not ends & set(key.split("."))}

    def _parts(self, part: str) -> list[nn.Module | nn.Parameter]:
        model: Any = self
        if part == "central":
            return super()._parts(part)
        return list(router_modules(model)) if part == "router" else [module for _, module in expert_modules(model)]


def dense_config(model: Any) -> Any:
    """The configuration that ``model`` had before its conversion."""
    values = model.config.to_dict()
    ours = ("mpoe", "mpoe_base", "conversion_errors", "auto_map", "model_type", "architectures", "transformers_version")
    config = model.dense_class.config_class(**{name: value for name, value in values.items() if name not in ours})
    config._attn_implementation = model.config._attn_implementation
    config._experts_implementation = model.config._experts_implementation
    return config


def with_stock_experts(model: Any) -> Any:
    """``model``, changed in place: its MPO experts are rebuilt as the experts of its dense class."""
    with torch.device("meta"):
        skeleton = model.dense_class(dense_config(model))
    for name, module in list(expert_modules(model)):
        if isinstance(module, MixtureExperts):
            stock: nn.Module = skeleton.get_submodule(name)
            for parameter, value in stock_weights(module).items():
                setattr(stock, parameter, value)
            stock.config = model.config
            set_module(model, name, stock)
    return model
