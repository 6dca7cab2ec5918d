"""`convert_to_mpoe` (dense model to MPO experts) and `merge_experts` (MPO experts to dense
experts)."""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_choice, check_type
from mpoe.layers.experts import MPOExperts
from mpoe.layers.feed_forward import MPOEFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.classes import classes_of, foreign_class
from mpoe.models.export import as_stock
from mpoe.models.find import dense_networks, find_sites
from mpoe.models.sites import EmbeddingSite, FFNSite, Report, set_module
from mpoe.models.table import EXPERT_COUNTS, TABLE, checked_sites, family_for
from mpoe.models.walk import modules_of, neuron_modules, rate_ratios_of
from mpoe_kernels import backend_reasons

Model = TypeVar("Model", bound=PreTrainedModel)
_LOCK = threading.RLock()


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """For a decorator: a function waits until no other thread is inside any function decorated so.

    While Transformers loads a model it changes global state: initialisers, the default dtype, the
    tying of weights. A model that another thread builds meanwhile would stay uninitialised.
    """
    with _LOCK:
        yield


def converted_class(model: Any, sites: Any = None) -> type[Any]:
    """The class of ``model`` after conversion."""
    if isinstance(model, MPOEModelMixin):
        raise ValueError(
            f"model must be dense; got {type(model).__name__}, which is an MPOE model already"
        )
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if any(getattr(config, name, None) for name in EXPERT_COUNTS):
        raise ValueError(
            f"model must be dense; got a {model_type}, which is a mixture of experts already"
        )
    if sites is not None:
        return foreign_class(type(model))  # type: ignore[arg-type]  # classes can be hashed
    known = classes_of(model_type) if model_type in TABLE else {}
    if type(model) not in known:
        heads = ", ".join(sorted(cls.__name__ for cls in known)) or f"a model of {', '.join(TABLE)}"
        raise ValueError(
            f"model must be {'one of ' if known else ''}{heads}; got {type(model).__name__} (for "
            "another model, name its projections with sites=...)"
        )
    return known[type(model)]


def check_finite(model: nn.Module) -> None:
    """Refuse NaN, Inf and parameters without memory (ValueError)."""
    bad = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model must hold weights; {name} is on the device meta, without any (load the "
                "model first; `mpoe plan` answers from its configuration alone)"
            )
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            bad.append(name)
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"model must hold finite weights; NaN or Inf in {shown}")


def _copy_without(model: Model, shared: Sequence[nn.Module]) -> Model:
    """Deep copy of ``model`` that shares the parameters of the modules that will be replaced."""
    memo: dict[int, Any] = {id(p): p for module in shared for p in module.parameters()}
    return copy.deepcopy(model, memo)


def adopt_class(model: PreTrainedModel, cls: type[Any], mpoe: MPOEConfig) -> None:
    """Turn ``model`` into a ``cls``: same modules and parameters, configs of the MPOE type,
    with the rate ratios of its cores."""
    source = type(model.config)
    mpoe.rate_ratios = rate_ratios_of(model)
    mapped: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if not isinstance(config, source):
            continue
        if id(config) not in mapped:
            converted: Any = copy.deepcopy(config)
            converted.__class__ = cls.config_class
            converted.mpoe = mpoe.to_dict()
            converted.mpoe_base = config._name_or_path
            converted.architectures = None
            mapped[id(config)] = converted
        module.config = mapped[id(config)]  # type: ignore[assignment]
    model.__class__ = cls
    # A model on the meta device shows what the constructor sets on an instance of the new class,
    # and registers the class for output capturing.
    with torch.device("meta"):
        skeleton = cls(model.config)
    for name in (
        "loss_type",
        "_keep_in_fp32_modules",
        "_keep_in_fp32_modules_strict",
        "_tp_plan",
        "_ep_plan",
    ):
        setattr(model, name, getattr(skeleton, name))


@one_at_a_time()
@torch.no_grad()
def convert_to_mpoe(
    model: Any,
    config: MPOEConfig | None = None,
    inplace: bool = False,
    sites: Mapping[str, Any] | None = None,
) -> Any:
    """Turn a dense model into a mixture of experts that, at full bonds, computes the same.

    Every feed-forward network gets a router (see ``moe_type``) and experts: blocks between its own
    projections (``shape="hidden"``, the default), hidden neurons beside it (``shape="neurons"``),
    or its matrices are decomposed once and copied to all experts, which share the central core.
    Networks that are not a module of their own (BART, OPT) support neither blocks nor neurons and
    get separable experts if no shape is named. Attention projections, the embedding with its tied
    head and BERT's pooler become MPOs if ``target_modules`` lists them. Nothing else changes.

    Args:
        model: of a family in `mpoe.models.table`, with any of its usual heads, in float32, float64,
            bfloat16 or float16; with ``sites`` any Transformers model.
        config: `MPOEConfig`; default ``MPOEConfig()``.
        inplace: convert ``model`` itself (its class and config change) instead of a copy.
        sites: for a model outside the table, how its feed-forward networks are built: the fields of
            `mpoe.models.table.FFN`, e.g. ``{"holder": "layers.*.mlp", "up": "up_proj", "gate_proj":
            "gate_proj", "down": "down_proj", "activation": "silu"}``. They are saved with the
            model.

    Returns:
        The converted model, an instance of a registered Hugging Face class, in the same training
        mode. Its attribute ``conversion_report`` maps the name of every MPO weight to its
        `Decomposition` errors: ``{"local_errors", "error_bound", "relative_error_bound"}``; the
        last is kept in ``config.conversion_errors``.

    Raises:
        ValueError: an unknown model class (the message lists the known ones), NaN or Inf in a
            parameter (by name), parameters on the device ``meta``, invalid shapes, exclusions,
            layer indices or ``sites``, all before any work; a gauge or a dtype's range that does
            not fit.
        TypeError: ``config`` or ``sites`` of another type.
    """
    given = None if sites is None else checked_sites(sites)
    cls = converted_class(model, given)
    config = MPOEConfig() if config is None else config
    check_type("config", config, MPOEConfig, "an MPOEConfig")
    family = family_for(given, cls.mpoe_family)
    places = find_sites(model, config, family)
    if config.is_hidden and any(isinstance(site, FFNSite) and site.obstacle for site in places):
        config = config.with_cores()
        places = find_sites(model, config, family)
    for site in places:
        site.check(config)
    tied = all(site.is_tied(model) for site in places if isinstance(site, EmbeddingSite))
    check_choice("backend", config.backend or "auto", ["auto", *backend_reasons()])
    check_finite(model)
    config = dataclasses.replace(config, rate_ratios={}, tied_head=tied)
    if not inplace:
        model = _copy_without(model, [module for site in places for module in site.replaced])
        places = find_sites(model, config, family)
    report: Report = {}
    for site in places:
        module: Any = site.build(config)
        report |= site.load(module, config)
        site.install(model, module, config)
    if given is not None:
        model.config.mpoe_sites = given
    adopt_class(model, cls, config)
    model.conversion_report = {
        name: {
            "local_errors": list(result.local_errors),
            "error_bound": result.error_bound,
            "relative_error_bound": result.relative_error_bound,
        }
        for name, result in report.items()
    }
    model.config.conversion_errors = {
        name: result.relative_error_bound for name, result in report.items()
    }
    return model


@one_at_a_time()
@torch.no_grad()
def merge_experts(model: Any, as_: str | None = None) -> Any:
    """A Switch-style model of the same class whose experts are full matrices and which computes the
    same.

    A mixture cannot merge into one feed-forward network: every expert's weight is rebuilt as a
    separate dense expert. Everything else in MPO form is unchanged.

    Args:
        model: an MPOE model with ``expert_type="mpo"``; it is not changed.
        as_: ``"mixtral"`` or ``"qwen3_moe"``, for experts of shape ``"neurons"``
            ``"granitemoeshared"`` or ``"qwen2_moe"``: returns an instance of that Transformers
            class, which every tool that supports the class can open (see `mpoe.models.export`). In
            this case the model's experts may already be dense.

    Raises:
        TypeError: a model that is not an MPOE model.
        ValueError: without ``as_``, experts that are already dense or neurons beside a dense
            network; a model that ``as_`` cannot represent exactly, with the reasons.
    """
    check_type("model", model, MPOEModelMixin, "an MPOE model (see convert_to_mpoe)")
    has_neurons = bool(neuron_modules(model))
    if has_neurons and as_ is None:
        raise ValueError(
            "model must have experts that each are a whole network; those of shape 'neurons' are "
            "added to a dense one, and no mixture of full matrices computes the same (merge_latent "
            "removes their latent space)"
        )
    mpoe = model.mpoe_config
    is_dense = mpoe.expert_type != "mpo"
    if as_ is not None:
        return as_stock(model if is_dense or has_neurons else merge_experts(model), as_)
    if is_dense:
        raise ValueError(f"model must have MPO experts; got expert_type={mpoe.expert_type!r}")
    whole = modules_of(model, MPOExperts)
    merged = _copy_without(model, list(whole.values()))
    layers = modules_of(merged, HiddenFeedForward)
    # A bias before the activation passes through an expert's block, so every dense expert needs its
    # own.
    has_bias = any(
        bias is not None
        for layer in layers.values()
        for bias in (layer.experts.bias, getattr(layer.projections()["up"], "bias", None))
    )
    config = dataclasses.replace(mpoe, expert_type="dense", expert_bias=has_bias, rate_ratios={})
    for name, experts in whole.items():
        dense = experts.as_dense(lambda cores: cores.dense_weights().contiguous(), has_bias)
        set_module(merged, name, dense)
    for site in dense_networks(merged) if layers else []:
        if site.name in layers:
            mixture: Any = site.build(config)
            fill_merged(mixture, layers[site.name])
            site.install(merged, mixture, config)
    return _with_config(merged, config)


@torch.no_grad()
def fill_merged(merged: MPOEFeedForward, layer: HiddenFeedForward) -> None:
    """Set dense experts to the weights that the hidden-side blocks of ``layer`` are equivalent to,
    behind its router."""
    merged.router = layer.router
    experts = layer.experts
    for kind, weights in merged.experts.projections().items():
        weights.weight.copy_(layer.expert_weights(kind))
        bias: Any = getattr(layer.projections()[kind], "bias", None)
        if weights.bias is None:
            continue
        weights.bias.copy_(torch.zeros_like(weights.bias) if bias is None else bias)
        if weights.bias.dim() == 2:  # before the experts' blocks
            weights.bias.copy_(layer.expert_weights(kind, weights.bias[:1])[:, 0])
            if experts.bias is not None and kind == ("gate_proj" if experts.is_gated else "up"):
                weights.bias.add_(experts.bias)


def _with_config(model: Any, config: MPOEConfig) -> Any:
    """``model``, with ``config`` and its rate ratios in its configurations and those of its
    parts."""
    config.rate_ratios = rate_ratios_of(model)
    for holder in model.modules():
        if isinstance(getattr(holder, "config", None), type(model.config)):
            holder.config.mpoe = config.to_dict()
    return model


@torch.no_grad()
def merge_latent(model: Any) -> Any:
    """A copy whose experts read and write the model's own space: exact up to rounding.

    Every expert's weights become the products with the shared matrices P and Q, ``a_e <- P a_e``,
    ``b_e <- b_e Q``.

    Args:
        model: an MPOE model with ``MPOEConfig(shape="neurons", latent=l)``; it is not changed.

    Raises:
        TypeError: ``model`` is not an MPOE model.
        ValueError: a model without such experts.
    """
    check_type("model", model, MPOEModelMixin, "an MPOE model with neurons (latent=l)")
    merged = copy.deepcopy(model)
    layers = [
        layer for layer in neuron_modules(merged).values() if layer.experts.latent is not None
    ]
    if not layers:
        raise ValueError(
            f"model must have neurons in a latent space (latent=l); this {type(model).__name__} "
            "has none"
        )
    for layer in layers:
        layer.experts = layer.experts.merged()
    return _with_config(merged, dataclasses.replace(model.mpoe_config, latent=None))
