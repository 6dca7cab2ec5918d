"""`mpoe_summary`: one row for every MPO weight of a model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mpoe.layers.cores import MPOCores
from mpoe.layers.kept import KeptFeedForward
from mpoe.models.kept import kept_modules
from mpoe.models.report import names_in_checkpoints, short_name
from mpoe_kernels import ContractionPlan, plan_contraction


@dataclass(frozen=True)
class WeightSummary:
    """One weight in MPO form.

    Attributes:
        name: name of the module that holds the cores.
        cores: the `MPOCores`, with their shape.
        error: relative error bound of the conversion; ``None`` if it is not in the model's config.
        plan: how a forward pass contracts it with the fewest FLOPs.
    """

    name: str
    cores: MPOCores
    error: float | None
    plan: ContractionPlan

    @property
    def central_parameters(self) -> int:
        return self.cores.central.numel()

    @property
    def auxiliary_parameters(self) -> int:
        """Of all experts together."""
        return sum(core.numel() for core in self.cores.auxiliary)


@dataclass(frozen=True)
class KeptSummary:
    """One feed-forward network that keeps its projections.

    Attributes:
        name: of the module.
        layer: its projections and experts.
        top_k: experts per token.
    """

    name: str
    layer: KeptFeedForward
    top_k: int
    error: float = 0.0  # nothing is decomposed

    @property
    def central_parameters(self) -> int:
        return sum(weight.numel() for weight in self.layer.central_parameters().values())

    @property
    def auxiliary_parameters(self) -> int:
        """Of all experts together."""
        return self.layer.own_parameters()


def summarize(model: PreTrainedModel, num_tokens: int, top_k: int = 1) -> list[WeightSummary | KeptSummary]:
    """A row for every MPO weight and for every network that keeps its projections, in the model's order.

    Args:
        model: an MPOE model.
        num_tokens: tokens of the pass that the plan is made for.
        top_k: experts per token.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a count.
    """
    rows: list[WeightSummary | KeptSummary] = []
    layers = kept_modules(model)
    for name, cores in model.named_modules():
        if name in layers:
            rows.append(KeptSummary(name, layers[name], top_k))
        if not isinstance(cores, MPOCores):
            continue
        per_token = 1 if cores.num_experts == 1 else top_k
        plan = plan_contraction(cores.shape, cores.num_experts, num_tokens, cores.central.dtype, top_k=per_token)
        rows.append(WeightSummary(name, cores, _conversion_error(model, name), plan))
    return rows


def _conversion_error(model: Any, name: str) -> float | None:
    """The conversion error of a weight from the model's config; older checkpoints have none."""
    errors = getattr(model.config, "conversion_errors", None)
    known = errors if isinstance(errors, dict) else {}
    found = next((known[key] for key in names_in_checkpoints(model, name) if key in known), None)
    return float(found) if isinstance(found, (int, float)) else None


LINE = 100  # characters of the legend's lines
HEADER = ("weight", "in x out", "factors", "bonds", "central", "auxiliary", "error", "plan", "x dense")


LEGEND = (
    "factors: the weight's axes, split; bonds: dimensions between the cores; central: parameters that all experts "
    "share; auxiliary: experts x parameters that each owns; error: of the conversion, at most, relative to the dense "
    "weight; plan: the order of the fewest FLOPs in a forward pass; x dense: FLOPs over a dense layer's"
)


def table_row(row: WeightSummary | KeptSummary) -> tuple[str, ...]:
    """The cells under `HEADER`."""
    if isinstance(row, KeptSummary):
        layer, experts = row.layer, row.layer.num_experts
        built, size = layer.described()
        return (
            short_name(row.name),
            f"{layer.in_features}x{layer.hidden_features}",
            built,
            size,
            f"{row.central_parameters:,}",
            f"{experts} x {row.auxiliary_parameters // experts:,}",
            "0",
            layer.shape,
            f"{layer.relative_flops(row.top_k):.2f}",
        )
    shape, experts = row.cores.shape, row.cores.num_experts
    per_expert = f"{row.auxiliary_parameters // experts:,}"
    dense = row.plan.flops / row.plan.dense_flops if row.plan.dense_flops else 0.0
    return (
        short_name(row.name),
        f"{shape.in_features}x{shape.out_features}",
        f"{'·'.join(map(str, shape.in_factors))} x {'·'.join(map(str, shape.out_factors))}",
        " ".join(map(str, shape.bond_dims[1:-1])),
        f"{row.central_parameters:,}",
        per_expert if experts == 1 else f"{experts} x {per_expert}",
        "-" if row.error is None else f"{row.error:.1e}" if row.error else "0",
        row.plan.strategy,
        f"{dense:.2f}",
    )


def print_summary(rows: Sequence[WeightSummary | KeptSummary], num_tokens: int) -> None:
    """Print `summarize` as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"MPO weights; plans for {num_tokens:,} tokens", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for name in HEADER:
        table.add_column(name, justify="left" if name in ("weight", "factors", "bonds", "plan") else "right")
    for row in rows:
        table.add_row(*map(Text, table_row(row)))
    console = Console()
    # If the width is unknown, as in a pipe, rows are not cut.
    Console(width=None if console.is_terminal else max(console.width, 120)).print(table)
    print(textwrap.fill(LEGEND, LINE))
