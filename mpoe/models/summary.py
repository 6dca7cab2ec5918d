"""`mpoe_summary`: one row for every MPO weight of a model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from mpoe.layers.cores import MPOCores
from mpoe.layers.kept import KeptFeedForward
from mpoe.models.report import names_in_checkpoints, short_name
from mpoe_kernels import ContractionPlan, plan_contraction

LINE = 100  # characters of the legend's lines
HEADER = ("weight", "in x out", "factors", "bonds", "central", "auxiliary", "error", "plan", "x dense")
LEGEND = (
    "factors: the weight's axes, split; bonds: dimensions between the cores; central: parameters that all experts "
    "share; auxiliary: experts x parameters that each owns; error: of the conversion, at most, relative to the dense "
    "weight; plan: the order of the fewest FLOPs in a forward pass; x dense: FLOPs over a dense layer's"
)


@dataclass(frozen=True)
class WeightSummary:
    """One weight in MPO form, or one feed-forward network that keeps its projections.

    Attributes:
        name: name of the module that holds the cores, or of the network's.
        cores: that module; its shape or sizes.
        error: relative error bound of the conversion; ``None`` if it is not in the model's config.
        plan: how a forward pass contracts a weight with the fewest FLOPs; ``None`` for a network.
        top_k: experts per token.
    """

    name: str
    cores: MPOCores | KeptFeedForward
    error: float | None
    plan: ContractionPlan | None
    top_k: int

    @property
    def central_parameters(self) -> int:
        return sum(weight.numel() for weight in self.cores.central_parameters().values())

    @property
    def auxiliary_parameters(self) -> int:
        """Of all experts together."""
        return self.cores.own_parameters()

    def cells(self) -> tuple[str, ...]:
        """What stands under `HEADER`."""
        if isinstance(self.cores, MPOCores):
            shape = self.cores.shape
            sizes = f"{shape.in_features}x{shape.out_features}"
            factors = f"{'·'.join(map(str, shape.in_factors))} x {'·'.join(map(str, shape.out_factors))}"
            built = factors, " ".join(map(str, shape.bond_dims[1:-1]))
        else:
            sizes, built = f"{self.cores.in_features}x{self.cores.hidden_features}", self.cores.described()
        if self.plan is not None:
            strategy, ratio = self.plan.strategy, self.plan.x_dense
        else:
            assert isinstance(self.cores, KeptFeedForward)
            strategy, ratio = self.cores.shape, self.cores.relative_flops(self.top_k)
        experts = self.cores.num_experts
        per_expert = f"{self.auxiliary_parameters // experts:,}"
        return (
            short_name(self.name),
            sizes,
            *built,
            f"{self.central_parameters:,}",
            per_expert if experts == 1 and self.plan is not None else f"{experts} x {per_expert}",
            "-" if self.error is None else f"{self.error:.1e}" if self.error else "0",
            strategy,
            f"{ratio:.2f}",
        )


def summarize(model: PreTrainedModel, num_tokens: int, top_k: int = 1) -> list[WeightSummary]:
    """A row for every MPO weight and for every network that keeps its projections, in the model's order.

    Args:
        model: an MPOE model.
        num_tokens: tokens of the pass that the plan is made for.
        top_k: experts per token.

    Raises:
        TypeError, ValueError: ``num_tokens`` is not a count.
    """
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, KeptFeedForward):
            rows.append(WeightSummary(name, module, 0.0, None, top_k))  # nothing is decomposed
        elif isinstance(module, MPOCores):
            per_token = 1 if module.num_experts == 1 else top_k
            plan = plan_contraction(module.shape, module.num_experts, num_tokens, module.central.dtype, top_k=per_token)
            rows.append(WeightSummary(name, module, _conversion_error(model, name), plan, per_token))
    return rows


def _conversion_error(model: Any, name: str) -> float | None:
    """The conversion error of a weight from the model's config, if it has one."""
    errors = getattr(model.config, "conversion_errors", None)
    known = errors if isinstance(errors, dict) else {}
    found = next((known[key] for key in names_in_checkpoints(model, name) if key in known), None)
    return float(found) if isinstance(found, (int, float)) else None


def print_summary(rows: Sequence[WeightSummary], num_tokens: int) -> None:
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
        table.add_row(*map(Text, row.cells()))
    console = Console()
    # If the width is unknown, as in a pipe, rows are not cut.
    Console(width=None if console.is_terminal else max(console.width, 120)).print(table)
    print(textwrap.fill(LEGEND, LINE))
