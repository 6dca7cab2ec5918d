"""Parameter counts, against the dense model and dense experts; `mpoe_summary`, one row for every
MPO weight; and the model card."""

from __future__ import annotations

import hashlib
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from mpoe.data.mappings import flatten
from mpoe.layers.cores import ExpertWeights, MPOCores
from mpoe.layers.feed_forward import KeptFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.layers.neurons import NeuronFeedForward
from mpoe.models.weight_files import write_text
from mpoe_kernels import plan_contraction

M = TypeVar("M", bound=nn.Module)
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
    "that all experts "
    "share; auxiliary: experts x parameters that each owns; error: of the conversion, at most, "
    "relative to the dense "
    "weight; plan: the order of the fewest FLOPs in a forward pass; x dense: FLOPs over a dense "
    "layer's"
)


def modules_of(model: nn.Module, kind: type[M]) -> dict[str, M]:
    """Every module of this class in a model by name, in the order in which a forward pass runs
    them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def mpo_modules(model: nn.Module) -> Iterator[tuple[str, MPOCores]]:
    """Every `MPOCores` of a model with its name."""
    return iter(modules_of(model, MPOCores).items())


def routed_layers(model: nn.Module) -> list[tuple[str, RoutedFeedForward]]:
    """The layers that have a router, in order."""
    return [
        (name, layer)
        for name, layer in modules_of(model, RoutedFeedForward).items()
        if layer.router is not None
    ]


# The networks of a model that kept their projections, those of the shape "hidden", those of the
# shape "neurons".
kept_modules = partial(modules_of, kind=KeptFeedForward)
hidden_modules = partial(modules_of, kind=HiddenFeedForward)
neuron_modules = partial(modules_of, kind=NeuronFeedForward)


def short_name(name: str) -> str:
    """A module's name without the parts that all modules of its kind have."""
    skipped = {
        "transformer",
        "model",
        "block",
        "layer",
        "experts",
        "DenseReluDense",
        "mlp",
        "cores",
    }
    return ".".join(part for part in name.split(".") if part not in skipped)


def names_in_checkpoints(model: Any, name: str) -> tuple[str, str, str]:
    """A module's names in checkpoints of this model, of the model with a head, and of its base."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def parameter_kind(model: nn.Module) -> dict[str, str]:
    """Parameter name -> ``"central"``, ``"auxiliary"``, ``"expert"`` (dense experts), ``"router"``
    or ``"rest"``.

    Dense projections that stay count as central, and so do the two matrices around a latent space.
    Biases shared by the experts of a layer count as rest. Tied parameters appear once.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kinds = dict.fromkeys(names.values(), "rest")
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, MPOCores):
            kinds.update(
                {f"{prefix}{core}": core.partition(".")[0] for core in module.core_names()}
            )
        elif isinstance(module, ExpertWeights):
            kinds[f"{prefix}weight"] = "expert"
        if isinstance(module, RoutedFeedForward) and module.router is not None:
            kinds[f"{prefix}router.weight"] = "router"
        if isinstance(module, KeptFeedForward):
            kinds.update(
                {
                    f"{prefix}experts.{parameter}": "auxiliary"
                    for parameter, _ in module.experts.named_parameters()
                }
            )
            kinds.update(
                {
                    names[id(w)]: "central"
                    for w in module.central_parameters().values()
                    if id(w) in names
                }
            )
    return kinds


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
    dense, switch = report["rest"], report["rest"] + report["router"]
    for module in model.modules():
        elements, experts = 0, 1  # numbers of a whole matrix, how many of them the experts would be
        if isinstance(module, KeptFeedForward):
            elements, experts = (
                sum(weight.numel() for weight in module.dense_parameters().values()),
                module.num_experts,
            )
        elif isinstance(module, (MPOCores, ExpertWeights)):
            elements, experts = module.in_features * module.out_features, module.num_experts
        dense, switch = dense + elements, switch + experts * elements
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
    errors: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    rows: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        error: Any = 0.0
        experts = getattr(module, "num_experts", 1)
        if isinstance(module, KeptFeedForward):  # nothing is decomposed
            built = f"{module.in_features}x{module.hidden_features}", *module.described()
            by, x_dense = module.shape, module.relative_flops(top_k)
        elif isinstance(module, MPOCores):
            shape, per_token = module.shape, 1 if experts == 1 else top_k
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
            by, x_dense = plan.strategy, plan.x_dense
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


# ---------------------------------------------------------------- the card

CARD_FILE = "README.md"
# A card ends with its own checksum; one that a user wrote or edited has no such end, and is never
# replaced.
_SEAL = re.compile(r"<!-- mpoe card ([0-9a-f]{16}) -->\n\Z")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PAPER = "[Gao et al., COLING 2022](https://arxiv.org/abs/2203.01104)"
# Transformers' card for a repository without one
TEMPLATE = "This model card has been automatically generated."
_PARTS = ("central", "auxiliary", "expert", "router", "rest")


def model_card(model: Any, metrics: Mapping[str, Any] | None = None) -> str:
    """Markdown with the metadata block of the Hugging Face hub.

    Args:
        model: an MPOE model.
        metrics: name -> number; nested mappings get dotted names, other values are left out.
    """
    base = base_name(model)
    shared = (
        f" All experts of a layer share the central core of a matrix product operator ({_PAPER})."
    )
    is_mpo = model.mpoe_config.expert_type == "mpo" and not model.mpoe_config.is_neurons
    metadata = ["---", "library_name: transformers", "tags:", "- mpoe", "- mixture-of-experts"]
    parts = [
        "\n".join([*metadata, *([f"base_model: {base}"] if base else []), "---"]),
        f"# {type(model).__name__.removeprefix('FSDP')}",
        "A Transformers model whose feed-forward networks are mixtures of "
        f"experts.{shared * is_mpo}",
        _table("property", facts(model)),
        "## Use",
        "```python\nfrom mpoe import load_mpoe\n\nmodel = load_mpoe(folder)  # the folder of this "
        "file\n```",
    ]
    numbers = {
        name: f"{value:.4g}"
        for name, value in flatten(metrics or {})
        if type(value) in (int, float)
    }
    if numbers:
        parts += ["## Results", _table("metric", numbers)]
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- mpoe card {_checksum(text)} -->\n"


def facts(model: Any) -> dict[str, str]:
    """What an MPOE model is, in words and numbers by name."""
    config, report, base = model.mpoe_config, parameter_report(model), base_name(model)
    experts = (
        f"{config.num_experts}, top-{config.top_k}" if routed_layers(model) else "1, no routers"
    )
    kind = "full matrices" if config.expert_type == "dense" else "matrix product operators"
    kind = "hidden neurons beside the dense network" if config.is_neurons else kind
    shapes = [str(cores.shape) for _, cores in mpo_modules(model)]
    shapes += [
        f"{layer.shape}, {layer.experts.extra_repr()}" for layer in kept_modules(model).values()
    ]
    return {
        "base model": f"`{base}`" if base else "not recorded",
        "experts": f"{experts}; {kind}",
        "mixture": f"`moe_type={config.moe_type}`, modules {', '.join(config.targets)}",
        **{f"shape {k}": f"`{shape}`" for k, shape in enumerate(dict.fromkeys(shapes), start=1)},
        "parameters": f"{report['total']:,}",
        "of them": ", ".join(f"{name} {report[name]:,}" for name in _PARTS if report[name]),
        "dense model": f"{report['dense_total']:,} parameters",
        "as many dense experts": f"{report['switch_total']:,} parameters",
    }


def may_write_card(file: Path) -> bool:
    """Whether ``file`` is absent, or a generated card that nobody has edited."""
    if not os.path.lexists(file):
        return True
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _checksum(text[: seal.start() - 1])


def write_card(model: Any, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> bool:
    """Write `model_card` into ``folder``, atomically and never through a link, unless a user's card
    is there; returns whether it was written."""
    file = Path(folder) / CARD_FILE
    if not may_write_card(file):
        return False
    write_text(file, model_card(model, metrics))
    return True


def base_name(model: Any) -> str:
    """The hub name of the converted dense model; empty for a local folder, whose path is
    private."""
    name = str(getattr(model.config, "mpoe_base", None) or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else ""


def _table(first: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {first} | value |", "|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
