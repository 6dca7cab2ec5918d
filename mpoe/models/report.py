"""Parameter counts, against the dense model and dense experts; and `mpoe_summary`, one row for
every MPO weight."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mpoe.layers.cores import ExpertWeights, MPOCores
from mpoe.layers.feed_forward import KeptFeedForward
from mpoe.layers.router import TopKRouter
from mpoe.models.walk import names_in_checkpoints, short_name
from mpoe_kernels import plan_contraction

LINE = 100  # characters of the legend's lines
HEADER = (
    "weight",
    "in x out",
    "factors",
    "bonds",
    "central",
    "auxiliary",
    "error",
    "plan",
    "x dense",
)
LEFT = ("weight", "factors", "bonds", "plan")  # columns of words
LEGEND = (
    "factors: the weight's axes, split; bonds: dimensions between the cores; central: parameters "
    "that all experts share; auxiliary: experts x parameters that each owns; error: of the "
    "conversion, at most, relative to the dense weight; plan: the order of the fewest FLOPs in a "
    "forward pass; x dense: FLOPs over a dense layer's"
)


def parameter_kind(model: nn.Module) -> dict[str, str]:
    """Parameter name -> ``"central"``, ``"auxiliary"``, ``"expert"`` (dense experts), ``"router"``
    or ``"rest"``.

    Dense projections that stay count as central, and so do the two matrices around a latent space.
    Biases shared by the experts of a layer count as rest. Tied parameters appear once.
    """
    kinds: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, TopKRouter):
            kinds[id(module.weight)] = "router"
        elif isinstance(module, ExpertWeights):
            kinds[id(module.weight)] = "expert"
        elif isinstance(module, (MPOCores, KeptFeedForward)):
            owner: nn.Module = module.auxiliary if isinstance(module, MPOCores) else module.experts
            kinds |= dict.fromkeys(map(id, owner.parameters()), "auxiliary")
            kinds |= dict.fromkeys(map(id, module.central_parameters().values()), "central")
    return {name: kinds.get(id(value), "rest") for name, value in model.named_parameters()}


def parameter_report(model: nn.Module) -> dict[str, int]:
    """Parameter counts of an MPOE model (works on the meta device).

    Returns:
        ``central``, ``auxiliary`` (all experts together), ``expert`` (weights of dense experts),
        ``router``, ``rest``, ``total``, ``trainable``, and for comparison ``dense_total`` (the
        model before conversion) and ``switch_total`` (the same experts with full weights).
    """
    kinds = parameter_kind(model)
    report = dict.fromkeys(("central", "auxiliary", "expert", "router", "rest"), 0)
    trainable = 0
    for name, parameter in model.named_parameters():
        report[kinds[name]] += parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    total = sum(report.values())
    dense = report["rest"]
    switch = report["rest"] + report["router"]
    for module in model.modules():
        if isinstance(module, KeptFeedForward):
            elements = sum(weight.numel() for weight in module.dense_parameters().values())
        elif isinstance(module, (MPOCores, ExpertWeights)):
            elements = module.in_features * module.out_features
        else:
            continue
        dense += elements
        switch += module.num_experts * elements
    return {
        **report,
        "total": total,
        "trainable": trainable,
        "dense_total": dense,
        "switch_total": switch,
    }


def format_report(report: dict[str, int]) -> str:
    """The report as a few lines for a terminal."""
    total = report["total"]

    def millions(key: str) -> str:
        return f"{report[key] / 1e6:,.2f}M"

    share = 100 * report["trainable"] / max(total, 1)
    expert = f" | dense experts: {millions('expert')}" if report["expert"] else ""
    return (
        f"trainable params: {report['trainable']:,} || all params: {total:,} || trainable%: "
        f"{share:.4f}\n"
        f"central: {millions('central')} | auxiliary: {millions('auxiliary')} | router: "
        f"{millions('router')} | "
        f"rest: {millions('rest')}{expert}\n"
        f"dense model: {millions('dense_total')} ({total / max(report['dense_total'], 1):.2f}x) | "
        f"dense-expert Switch: {millions('switch_total')} "
        f"({report['switch_total'] / max(total, 1):.2f}x this model)"
    )


# ---------------------------------------------------------------- the table


def summarize(model: Any, num_tokens: int, top_k: int = 1) -> dict[str, tuple[str, ...]]:
    """What stands under `HEADER`, by name of every module of MPO cores and of every network that
    keeps its projections.

    Args:
        model: an MPOE model.
        num_tokens: tokens of the pass that the plan is made for.
        top_k: experts per token.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a count.
    """
    recorded = getattr(model.config, "conversion_errors", None)
    errors: dict = recorded if isinstance(recorded, dict) else {}
    rows: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        error: Any = 0.0
        experts = getattr(module, "num_experts", 1)
        if isinstance(module, KeptFeedForward):  # nothing is decomposed
            built = f"{module.in_features}x{module.hidden_features}", *module.described()
            by = module.shape
            x_dense = module.relative_flops(top_k)
        elif isinstance(module, MPOCores):
            shape = module.shape
            per_token = 1 if experts == 1 else top_k
            plan = plan_contraction(
                shape, experts, num_tokens, module.central.dtype, top_k=per_token
            )
            error = next(
                (errors[key] for key in names_in_checkpoints(model, name) if key in errors), None
            )
            factors = " x ".join(
                "·".join(map(str, side)) for side in (shape.in_factors, shape.out_factors)
            )
            built = (
                f"{shape.in_features}x{shape.out_features}",
                factors,
                " ".join(map(str, shape.bond_dims[1:-1])),
            )
            by = plan.strategy
            x_dense = plan.x_dense
        else:
            continue
        central = sum(weight.numel() for weight in module.central_parameters().values())
        owned = f"{module.own_parameters() // experts:,}"
        owned = owned if experts == 1 and isinstance(module, MPOCores) else f"{experts} x {owned}"
        known = isinstance(error, (int, float))  # a file may hold anything
        off = f"{error:.1e}" if known and error else "0" if known else "-"
        rows[name] = (short_name(name), *built, f"{central:,}", owned, off, by, f"{x_dense:.2f}")
    return rows


def print_summary(rows: Mapping[str, Sequence[str]], num_tokens: int) -> None:
    """Print `summarize` as a table."""
    lines = [HEADER, *rows.values()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"MPO weights; plans for {num_tokens:,} tokens\n")
    for cells in lines:
        columns = zip(HEADER, cells, widths, strict=True)
        print(
            "  ".join(
                f"{cell:{'<' if name in LEFT else '>'}{width}}" for name, cell, width in columns
            ).rstrip()
        )
    print(f"\n{textwrap.fill(LEGEND, LINE)}")
