"""Parameter counts, against the dense model and dense experts; and `mpoe_summary`, one row for every MPO weight."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from mpoe.layers.cores import ExpertWeights, MPOCores
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.layers.neurons import NeuronFeedForward
from mpoe_kernels import ContractionPlan, plan_contraction

LINE = 100  # characters of the legend's lines
HEADER = ("weight", "in x out", "factors", "bonds", "central", "auxiliary", "error", "plan", "x dense")
LEFT = ("weight", "factors", "bonds", "plan")  # columns of words
LEGEND = (
    "factors: the weight's axes, split; bonds: dimensions between the cores; central: parameters that all experts "
    "share; auxiliary: experts x parameters that each owns; error: of the conversion, at most, relative to the dense "
    "weight; plan: the order of the fewest FLOPs in a forward pass; x dense: FLOPs over a dense layer's"
)


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


def kept_modules(model: nn.Module) -> dict[str, KeptFeedForward]:
    """Every network of a model that kept its projections, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, KeptFeedForward)}


def hidden_modules(model: nn.Module) -> dict[str, HiddenFeedForward]:
    """Every `HiddenFeedForward` of a model by name."""
    return {name: module for name, module in kept_modules(model).items() if isinstance(module, HiddenFeedForward)}


def neuron_modules(model: nn.Module) -> dict[str, NeuronFeedForward]:
    """Every `NeuronFeedForward` of a model by name."""
    return {name: module for name, module in kept_modules(model).items() if isinstance(module, NeuronFeedForward)}


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

    Dense projections that stay count as central, and so do the two matrices around a latent space. Biases shared by the
    experts of a layer count as rest. Tied parameters appear once.
    """
    kinds = dict.fromkeys((name for name, _ in model.named_parameters()), "rest")
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, MPOCores):
            kinds.update({f"{prefix}{core}": core.partition(".")[0] for core in module.core_names()})
        elif isinstance(module, ExpertWeights):
            kinds[f"{prefix}weight"] = "expert"
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
    for module in model.modules():
        elements, experts = 0, 1  # numbers of a whole matrix, how many of them the experts would be
        if isinstance(module, KeptFeedForward):
            elements, experts = sum(weight.numel() for weight in module.dense_parameters().values()), module.num_experts
        elif isinstance(module, (MPOCores, ExpertWeights)):
            elements, experts = module.in_features * module.out_features, module.num_experts
        dense, switch = dense + elements, switch + experts * elements
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


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class WeightSummary:
    """One weight in MPO form, or one feed-forward network that keeps its projections.

    Attributes:
        name: name of the module that holds the cores, or of the network's.
        cores: that module; its shape or sizes.
        error: relative error bound of the conversion; ``None`` if it is not in the model's config.
        plan: how a forward pass contracts a weight with the fewest FLOPs; ``None`` for a network.
        cells: what stands under `HEADER`.
    """

    name: str
    cores: MPOCores | KeptFeedForward
    error: float | None
    plan: ContractionPlan | None
    cells: tuple[str, ...]


def summarize(model: Any, num_tokens: int, top_k: int = 1) -> list[WeightSummary]:
    """A row for every MPO weight and for every network that keeps its projections, in the model's order.

    Args:
        model: an MPOE model.
        num_tokens: tokens of the pass that the plan is made for.
        top_k: experts per token.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a count.
    """
    told = getattr(model.config, "conversion_errors", None)
    errors: dict[str, Any] = told if isinstance(told, dict) else {}
    rows = []
    for name, module in model.named_modules():
        error: float | None = 0.0
        plan, experts = None, getattr(module, "num_experts", 1)
        if isinstance(module, KeptFeedForward):  # nothing is decomposed
            built = f"{module.in_features}x{module.hidden_features}", *module.described()
            by, x_dense = module.shape, module.relative_flops(top_k)
        elif isinstance(module, MPOCores):
            shape, per_token = module.shape, 1 if experts == 1 else top_k
            plan = plan_contraction(shape, experts, num_tokens, module.central.dtype, top_k=per_token)
            found = next((errors[key] for key in names_in_checkpoints(model, name) if key in errors), None)
            error = float(found) if isinstance(found, (int, float)) else None
            factors = " x ".join("·".join(map(str, side)) for side in (shape.in_factors, shape.out_factors))
            built = f"{shape.in_features}x{shape.out_features}", factors, " ".join(map(str, shape.bond_dims[1:-1]))
            by, x_dense = plan.strategy, plan.x_dense
        else:
            continue
        central = sum(weight.numel() for weight in module.central_parameters().values())
        own = f"{module.own_parameters() // experts:,}"
        own = own if experts == 1 and plan is not None else f"{experts} x {own}"
        off = "-" if error is None else f"{error:.1e}" if error else "0"
        cells = (short_name(name), *built, f"{central:,}", own, off, by, f"{x_dense:.2f}")
        rows.append(WeightSummary(name, module, error, plan, cells))
    return rows


def print_summary(rows: Sequence[WeightSummary], num_tokens: int) -> None:
    """Print `summarize` as a table."""
    lines = [HEADER, *(row.cells for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"MPO weights; plans for {num_tokens:,} tokens\n")
    for cells in lines:
        columns = zip(HEADER, cells, widths, strict=True)
        print("  ".join(f"{cell:{'<' if name in LEFT else '>'}{width}}" for name, cell, width in columns).rstrip())
    print(f"\n{textwrap.fill(LEGEND, LINE)}")
