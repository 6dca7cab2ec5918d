"""`convert_to_mpoe` and `merge_experts`: from a dense model to a mixture of MPO experts, and to dense experts."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from mpoe.config import MPOEConfig
from mpoe.layers.dense import ExpertWeights
from mpoe.layers.experts import DenseExperts, MPOExperts
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.bert import MPOEBertForMaskedLM, MPOEBertForSequenceClassification, MPOEBertModel
from mpoe.models.families import FAMILIES
from mpoe.models.find import find_sites
from mpoe.models.gpt2 import MPOEGPT2LMHeadModel, MPOEGPT2Model
from mpoe.models.hidden import fill_merged, hidden_modules, merged_config
from mpoe.models.llama import MPOELlamaForCausalLM
from mpoe.models.one_at_a_time import one_at_a_time
from mpoe.models.report import mpo_modules
from mpoe.models.sites import EmbeddingSite, FFNSite, Site
from mpoe.models.t5 import MPOET5ForConditionalGeneration
from mpoe_kernels import Decomposition, backend_reasons

Model = TypeVar("Model", bound=PreTrainedModel)

CONVERTED: dict[type[PreTrainedModel], type[Any]] = {
    T5ForConditionalGeneration: MPOET5ForConditionalGeneration,
    GPT2Model: MPOEGPT2Model,
    GPT2LMHeadModel: MPOEGPT2LMHeadModel,
    BertModel: MPOEBertModel,
    BertForSequenceClassification: MPOEBertForSequenceClassification,
    BertForMaskedLM: MPOEBertForMaskedLM,
    LlamaForCausalLM: MPOELlamaForCausalLM,
}


def _converted_class(model: Any) -> type[Any]:
    if isinstance(model, MPOEModelMixin):
        raise ValueError(f"model must be dense; got {type(model).__name__}, which is an MPOE model already")
    if type(model) not in CONVERTED:
        known = ", ".join(sorted(cls.__name__ for cls in CONVERTED))
        raise ValueError(f"model must be one of {known}; got {type(model).__name__}")
    return CONVERTED[type(model)]


def _check_finite(model: nn.Module) -> None:
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise ValueError(
            f"model must hold weights; {absent} is on the device meta, without any (load the model first; `mpoe plan`"
            " answers from its configuration alone)"
        )
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all())
    ]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"model must hold finite weights; NaN or Inf in {shown}")


def _check_backend(name: str | None) -> None:
    known = backend_reasons()
    if name is not None and name != "auto" and name not in known:
        raise ValueError(f"backend must be one of {['auto', *known]} or None; got {name!r}")


def _copy_without(model: Model, shared: Sequence[nn.Module]) -> Model:
    """Deep copy of ``model`` that shares the parameters of the modules it is about to lose."""
    memo: dict[int, Any] = {id(p): p for module in shared for p in module.parameters()}
    return copy.deepcopy(model, memo)


def _mpoe_model_config(config: PreTrainedConfig, cls: type[PreTrainedConfig], mpoe: MPOEConfig) -> PreTrainedConfig:
    values = config.to_dict()
    for key in ("model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    converted = cls(**values, mpoe=mpoe)  # type: ignore[call-arg]
    converted._attn_implementation = config._attn_implementation
    converted._name_or_path = converted.mpoe_base = config._name_or_path
    return converted


def _adopt_class(model: PreTrainedModel, cls: type[Any], mpoe: MPOEConfig) -> None:
    """Turn ``model`` into a ``cls``: same modules and parameters, configs of the MPOE type."""
    source = type(model.config)
    mapped: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, source):
            if id(config) not in mapped:
                mapped[id(config)] = _mpoe_model_config(config, cls.config_class, mpoe)
            module.config = mapped[id(config)]  # type: ignore[assignment]
    model.__class__ = cls
    # A skeleton without memory shows what the constructor sets on an instance of the new class, and registers the
    # class for output capturing.
    with torch.device("meta"):
        skeleton = cls(model.config)
    for name in ("loss_type", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        setattr(model, name, getattr(skeleton, name))


def _check_sites(model: Any, sites: Sequence[Site], config: MPOEConfig) -> bool:
    """Refuse shapes that do not fit; returns whether the head is tied to a table that becomes an MPO."""
    for site in sites:
        site.check(config)
    tables = [site for site in sites if isinstance(site, EmbeddingSite)]
    return all(table.is_tied(model) for table in tables)


@one_at_a_time
@torch.no_grad()
def convert_to_mpoe(model: Any, config: MPOEConfig | None = None, inplace: bool = False) -> Any:
    """Turn a dense model into a mixture of experts that, at full bonds, computes the same.

    Every feed-forward network is decomposed once and copied to all experts, which share its central core; a router
    is added (see ``moe_type``). Attention projections, the embedding with its tied head and BERT's pooler become MPOs
    where ``target_modules`` says so. Nothing else changes.

    Args:
        model: a `T5ForConditionalGeneration`, `GPT2Model`, `GPT2LMHeadModel`, `LlamaForCausalLM`, `BertModel`,
            `BertForSequenceClassification` or `BertForMaskedLM`, in float32, float64, bfloat16 or float16.
        config: `MPOEConfig`; default ``MPOEConfig()``.
        inplace: convert ``model`` itself (its class and config change) instead of a copy.

    Returns:
        The converted model, of a registered Hugging Face class, in the same training mode. Its attribute
        ``conversion_report`` maps the name of every MPO weight to its `Decomposition` errors:
        ``{"local_errors", "error_bound", "relative_error_bound"}``; the last is kept in ``config.conversion_errors``.

    Raises:
        ValueError: an unknown model class (with the known ones), NaN or Inf in a parameter (by name), parameters
            on the device ``meta``, shapes, exclusions or layer indices that do not fit; all before any work.
        TypeError: ``config`` of another type.
    """
    cls = _converted_class(model)
    config = MPOEConfig() if config is None else config
    if not isinstance(config, MPOEConfig):
        raise TypeError(f"config must be an MPOEConfig; got {type(config).__name__}")
    family = FAMILIES[cls.mpoe_family]
    sites = find_sites(model, family, model.config, config)
    tied = _check_sites(model, sites, config)
    _check_backend(config.backend)
    _check_finite(model)
    if cls.mpoe_family == "t5" and model.dtype == torch.float16:
        warnings.warn(
            "T5 in float16: Transformers keeps the down projections (wo) in float32 because float16 overflows there; "
            "the experts' are float16 like the rest. Prefer bfloat16.",
            stacklevel=2,
        )
    config = dataclasses.replace(config, rate_ratios={}, tied_head=tied)
    if not inplace:
        model = _copy_without(model, [module for site in sites for module in site.replaced])
        sites = find_sites(model, family, model.config, config)
    report: dict[str, Decomposition] = {}
    for site in sites:
        module: Any = site.build(config)
        report.update(site.load(module, config))
        site.install(model, module, config)
    config.rate_ratios = {name: list(cores.rate_ratios) for name, cores in mpo_modules(model)}
    _adopt_class(model, cls, config)
    model.conversion_report = {
        name: {
            "local_errors": list(result.local_errors),
            "error_bound": result.error_bound,
            "relative_error_bound": result.relative_error_bound,
        }
        for name, result in report.items()
    }
    model.config.conversion_errors = {name: result.relative_error_bound for name, result in report.items()}
    return model


@one_at_a_time
@torch.no_grad()
def merge_experts(model: Any) -> Any:
    """A Switch-style model of the same class whose experts are full matrices, computing the same.

    A mixture cannot merge into one feed-forward network: every expert's weight is rebuilt as its own dense expert.
    Everything else in MPO form stays as it is.

    Args:
        model: an MPOE model with ``expert_type="mpo"``; it is left as it is.

    Raises:
        TypeError: a model that is no MPOE model.
        ValueError: experts that are dense already.
    """
    if not isinstance(model, MPOEModelMixin):
        raise TypeError(f"model must be an MPOE model (see convert_to_mpoe); got {type(model).__name__}")
    if model.mpoe_config.expert_type != "mpo":
        raise ValueError(f"model must have MPO experts; got expert_type={model.mpoe_config.expert_type!r}")
    source: Any = model
    mpo_experts = [module for module in source.modules() if isinstance(module, MPOExperts)]
    merged = _copy_without(source, mpo_experts)
    for module in merged.modules():
        if isinstance(module, MPOEFeedForward) and isinstance(module.experts, MPOExperts):
            module.experts = _dense_experts(module.experts)
    layers = hidden_modules(merged)
    config = merged_config(model.mpoe_config, layers)
    for site in find_sites(merged, FAMILIES[merged.mpoe_family], merged.config, config) if layers else ():
        if site.name in layers:
            assert isinstance(site, FFNSite)
            dense = site.build(config)
            fill_merged(dense, layers[site.name])
            site.install(merged, dense, config)
    config.rate_ratios = {name: list(cores.rate_ratios) for name, cores in mpo_modules(merged)}
    for holder in merged.modules():
        if isinstance(getattr(holder, "config", None), type(merged.config)):
            holder.config.mpoe = config.to_dict()
    return merged


def _dense_experts(experts: MPOExperts) -> DenseExperts:
    up = experts.up
    dense = DenseExperts(
        up.in_features,
        up.out_features,
        experts.num_experts,
        experts.activation,
        up.bias is not None,
        experts.is_gated,
        {kind: cores.init_std for kind, cores in experts.projections().items()},
        device="meta",
    )
    for kind, cores in experts.projections().items():
        weights: ExpertWeights = dense.projections()[kind]
        weights.weight = nn.Parameter(cores.dense_weights().contiguous())
        if cores.bias is not None:
            weights.bias = nn.Parameter(cores.bias.clone())
    return dense.train(experts.training)
