"""Parameter counts: central, auxiliary, router, rest; against the dense model and dense experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights
from mpoe.layers.experts import MixtureExperts
from mpoe.layers.feed_forward import MPOEFeedForward, RoutedFeedForward
from mpoe.layers.kept import KeptFeedForward
from mpoe.models.stock_experts import is_stock_experts


def mpo_modules(model: nn.Module) -> Iterator[tuple[str, MPOCores]]:
    """Every `MPOCores` of a model with its name."""
    for name, module in model.named_modules():
        if isinstance(module, MPOCores):
            yield name, module


def routed_layers(model: nn.Module) -> list[tuple[str, RoutedFeedForward]]:
    """The layers that have a router, in the order in which a forward pass runs them."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, RoutedFeedForward) and module.router is not None
    ]


def short_name(name: str) -> str:
    """A module's name without the parts that all modules of its kind have."""
    skipped = {"transformer", "model", "block", "layer", "experts", "DenseReluDense", "mlp", "cores"}
    return ".".join(part for part in name.split(".") if part not in skipped)


def names_in_checkpoints(model: Any, name: str) -> tuple[str, str, str]:
    """A module's names in checkpoints of this model, of the model with a head, and of its base."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def parameter_kind(model: nn.Module) -> dict[str, str]:
    """Parameter name -> ``"central"``, ``"auxiliary"``, ``"expert"`` (dense experts), ``"router"`` or ``"rest"``.

    The router of a model that was a mixture before its conversion counts as rest. Dense projections that stay count as
    central, and so do the two matrices around a latent space. Biases shared by the experts of a layer count as rest.
    Tied parameters appear once.
    """
    kinds = dict.fromkeys((name for name, _ in model.named_parameters()), "rest")
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, MPOCores):
            kinds.update({f"{prefix}{core}": core.partition(".")[0] for core in module.core_names()})
        elif isinstance(module, ExpertWeights):
            kinds[f"{prefix}weight"] = "expert"
        elif is_stock_experts(module):
            kinds.update({f"{prefix}{held}": "expert" for held in ("gate_up_proj", "down_proj")})
        if isinstance(module, RoutedFeedForward) and module.router is not None:
            kinds[f"{prefix}router.weight"] = "router"
        if isinstance(module, KeptFeedForward):
            centre = {id(weight) for weight in module.central_parameters().values()}
            kinds.update({f"{prefix}experts.{own}": "auxiliary" for own, _ in module.experts.named_parameters()})
            kinds.update({known: "central" for known, parameter in model.named_parameters() if id(parameter) in centre})
    return kinds


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Parameter counts of an MPOE model (works on the meta device).

    Returns:
        ``central``, ``auxiliary`` (all experts together), ``expert`` (weights of dense experts), ``router``, ``rest``,
        ``total``, ``trainable``, and for comparison ``dense_total`` (the model before conversion) and
        ``switch_total`` (the same experts with full weights).
    """
    kinds = parameter_kind(model)
    report = dict.fromkeys(("central", "auxiliary", "expert", "router", "rest"), 0)
    trainable = 0
    for name, parameter in model.named_parameters():
        report[kinds[name]] += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    total = sum(report.values())
    dense, switch = report["rest"], report["rest"] + report["router"]
    in_feed_forward = set()
    for name, module in model.named_modules():
        if isinstance(module, MPOEFeedForward):
            for kind, projection in module.experts.projections().items():
                in_feed_forward.add(f"{name}.experts.{kind}")
                elements = projection.in_features * projection.out_features
                dense += elements
                switch += module.num_experts * elements
        elif isinstance(module, KeptFeedForward):
            elements = sum(weight.numel() for weight in module.dense_parameters().values())
            dense += elements
            switch += module.num_experts * elements
        elif isinstance(module, MixtureExperts):  # the model had as many experts before
            for kind, cores in module.projections().items():
                in_feed_forward.add(f"{name}.{kind}")
                dense += module.num_experts * cores.in_features * cores.out_features
                switch += module.num_experts * cores.in_features * cores.out_features
        elif is_stock_experts(module):
            elements = sum(parameter.numel() for parameter in module.parameters())
            dense, switch = dense + elements, switch + elements
    for name, cores in mpo_modules(model):
        if name.removesuffix(".base_layer") not in in_feed_forward:  # PEFT's name for adapted ones
            dense += cores.in_features * cores.out_features
            switch += cores.in_features * cores.out_features
    return {**report, "total": total, "trainable": trainable, "dense_total": dense, "switch_total": switch}


def format_report(report: dict[str, int]) -> str:
    """The report as a few lines for a terminal."""
    total = report["total"]

    def millions(key: str) -> str:
        return f"{report[key] / 1e6:,.2f}M"

    share = 100 * report["trainable"] / max(total, 1)
    expert = f" | dense experts: {millions('expert')}" if report["expert"] else ""
    return (
        f"trainable params: {report['trainable']:,} || all params: {total:,} || trainable%: {share:.4f}\n"
        f"central: {millions('central')} | auxiliary: {millions('auxiliary')} | router: {millions('router')} | "
        f"rest: {millions('rest')}{expert}\n"
        f"dense model: {millions('dense_total')} ({total / max(report['dense_total'], 1):.2f}x) | "
        f"dense-expert Switch: {millions('switch_total')} ({report['switch_total'] / max(total, 1):.2f}x this model)"
    )
