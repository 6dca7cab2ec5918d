"""Tables of `mpoe plan`, made to read well at 100 columns and more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mpoe.cli.plan_notes import plan_notes, suggestion_notes

if TYPE_CHECKING:
    from mpoe.planning.costs import Cost, LayerCosts, MatrixCosts, ModelCosts, Workload
    from mpoe.planning.inventory import Inventory
    from mpoe.planning.suggest import Budget, Suggestion
    from mpoe_kernels.planner import Hardware

NAMES = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
_PLAIN_WIDTH = 110  # where nothing tells the width, as in a pipe


def console() -> Console:
    """The terminal; wide enough for the tables where there is none."""
    plain = Console()
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(width=_PLAIN_WIDTH)


def count(number: float) -> str:
    """``294.0M``: parameters, in the units that papers use."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{_digits(number / size)}{unit}"
    return f"{number:.0f}"


def _digits(value: float) -> str:
    """Four significant digits, without an exponent."""
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def size(number: float) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{_digits(number / scale)} {unit}"
    return f"{number:.0f} B"


def operations(number: float) -> str:
    """Operations in mega, giga or tera."""
    scale, unit = (1e12, "T") if number >= 1e12 else (1e9, "G") if number >= 1e9 else (1e6, "M")
    return "0" if not number else f"{_digits(number / scale)} {unit}"


def duration(seconds: float) -> str:
    """A time in its natural unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{_digits(seconds / scale)} {unit}"
    return f"{seconds / 1e-6:.1f} us" if seconds else "0"


def ratio(value: float | None) -> str:
    """``1.17``; a dash where there is nothing to divide by."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def over(cost: Cost, dense: Cost) -> str:
    """Time over the dense one's."""
    return ratio(cost.seconds / dense.seconds if dense.seconds else None)


def strategies(matrix: MatrixCosts) -> str:
    """Forward and backward strategies of the planner; one word when they are the same."""
    return " / ".join(dict.fromkeys(phase.strategy for phase in matrix.plan.phases))


def _cost_cells(cost: Cost, dense: Cost, training: bool) -> list[str]:
    return [
        count(cost.parameters),
        *([size(cost.optimizer_bytes)] if training else []),
        size(cost.temporary_bytes) if cost.temporary_bytes else "-",
        operations(cost.flops),
        duration(cost.seconds),
        over(cost, dense),
    ]


def new_table(title: str) -> Table:
    """An empty table, narrow between its columns."""
    style = {"title_justify": "left", "title_style": "bold", "box": box.HORIZONTALS}
    return Table(title=title, padding=(0, 1, 0, 0), pad_edge=False, **style)  # type: ignore[arg-type]


def _cost_table(title: str, first: str, training: bool, last: str | None = None) -> Table:
    table = new_table(title)
    table.add_column(first, no_wrap=True)
    table.add_column("design", no_wrap=True)
    names = ["parameters", *(["optimizer"] if training else []), "temporary", "FLOP", "time", "x dense"]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    if last:
        table.add_column(last)
    return table


def _head(inventory: Inventory, work: Workload) -> str:
    hardware = work.device.hardware
    tokens = ", ".join(f"{number:,} {stream} tokens" for stream, number in work.tokens.items())
    tokens = tokens.replace(" main tokens", " tokens")  # the only stream of GPT-2 and BERT has no name worth saying
    phase = "training" if work.training else "inference"
    masked = ", central cores masked" if work.mask_central else ""
    return (
        f"[bold]{escape(inventory.name)}[/bold] ({escape(inventory.source)}; {inventory.class_name}, "
        f"{count(inventory.parameters)} parameters), {phase}{masked}: {tokens} a step, "
        f"{str(work.device.dtype).removeprefix('torch.')} on {escape(hardware.name)}"
    )


def show_plan(costs: ModelCosts, per_layer: bool = False, explain: bool = False) -> None:
    """Print the costs of every kind of layer, of the whole model, and what they assume."""
    out = console()
    work, experts, top_k = costs.workload, costs.config.num_experts, costs.config.router.top_k
    out.print(_head(costs.inventory, work), highlight=False)
    shape = costs.config.shape if isinstance(costs.config.shape, str) else "given"
    out.print(f"{experts:,} experts, top-{top_k}, shape {shape}\n", highlight=False)
    for layer in costs.layers:
        _show_layer(out, layer, work, explain)
    if per_layer:
        _show_every_layer(out, costs)
    _show_totals(out, costs)
    show_notes(out, plan_notes(costs))


def _layer_title(layer: LayerCosts) -> str:
    streams = " and ".join(s for s in layer.streams if s != "main")
    kind = f"{streams} feed-forward layer" if streams else "feed-forward layer"
    return f"{layer.count} {kind}{'s' if layer.count > 1 else ''} of {layer.tokens:,} tokens; of one:"


def _show_layer(out: Console, layer: LayerCosts, work: Workload, explain: bool) -> None:
    last = "forward / backward" if work.training else "strategy"
    table = _cost_table(_layer_title(layer), "matrix", work.training, last)
    for matrix in layer.matrices:
        label = f"{matrix.matrix.kind} {matrix.matrix.rows}x{matrix.matrix.columns}"
        ways = {"mpoe": strategies(matrix), "switch": "GEMM per expert", "dense": "one GEMM"}
        for design, cost in matrix.costs.items():
            cells = _cost_cells(cost, matrix.costs["dense"], work.training)
            table.add_row(label if design == "mpoe" else "", NAMES[design], *cells, ways[design])
        table.add_section()
    cells = _cost_cells(layer.routing, layer.routing, work.training)
    table.add_row("routing", "both", *cells[:-1], "", "router, copies")
    table.add_section()
    for design, name in NAMES.items():
        cells = _cost_cells(layer.cost(design), layer.cost("dense"), work.training)
        table.add_row("layer" if design == "mpoe" else "", name, *cells, "", style="bold" if design == "mpoe" else "")
    out.print(table)
    for matrix in layer.matrices:
        lossless = "lossless" if matrix.shape.is_full else "truncated"
        share = matrix.shape.auxiliary_parameters / matrix.matrix.elements
        text = f"{matrix.matrix.kind}: {matrix.shape}; {lossless}, {share:.2%} of the matrix per expert"
        out.print(escape(text), highlight=False)
        if explain:
            out.print(escape(str(matrix.plan)), highlight=False)
    out.print()


def _show_every_layer(out: Console, costs: ModelCosts) -> None:
    table = new_table("Every layer: parameters of the three designs, time of MPOE")
    table.add_column("layer", no_wrap=True)
    for name in ("tokens", *NAMES.values(), "time", "x dense"):
        table.add_column(name, justify="right", no_wrap=True)
    group_of = {name: layer for layer in costs.layers for name in layer.names}
    for item in costs.inventory.layers:
        layer = group_of[item.name]
        cost, dense = layer.cost("mpoe"), layer.cost("dense")
        parameters = [count(layer.cost(design).parameters) for design in NAMES]
        table.add_row(item.name, f"{layer.tokens:,}", *parameters, duration(cost.seconds), over(cost, dense))
    out.print(table)
    out.print()


def _show_totals(out: Console, costs: ModelCosts) -> None:
    training = costs.workload.training
    table = _cost_table("In total", "part", training)
    number = sum(layer.count for layer in costs.layers)
    for design, name in NAMES.items():
        cells = _cost_cells(costs.experts(design), costs.experts("dense"), training)
        table.add_row(f"{number} feed-forward layers" if design == "mpoe" else "", name, *cells)
    table.add_section()
    table.add_row("rest of the model", "all", *_cost_cells(costs.rest, costs.rest, training)[:-1], "")
    table.add_section()
    for design, name in NAMES.items():
        cells = _cost_cells(costs.whole(design), costs.whole("dense"), training)
        table.add_row("whole model" if design == "mpoe" else "", name, *cells, style="bold" if design == "mpoe" else "")
    if training:
        table.add_section()
        dense = costs.optimizer_seconds(costs.updated("dense"))
        for design, name in NAMES.items():
            seconds = costs.optimizer_seconds(costs.updated(design))
            cells = ["", "", "", "", duration(seconds), ratio(seconds / dense)]
            table.add_row("AdamW step" if design == "mpoe" else "", name, *cells)
    out.print(table)


def show_notes(out: Console, notes: Sequence[str]) -> None:
    grid = Table.grid(padding=(0, 1))
    for note in notes:
        grid.add_row("*", escape(note))
    out.print(grid, style="dim", highlight=False)


def show_suggestions(
    suggestions: Sequence[Suggestion], inventory: Inventory, work: Workload, budget: Budget, rank_by: str
) -> None:
    """Print the shapes that meet a budget."""
    from mpoe.planning.suggest import front

    out = console()
    out.print(_head(inventory, work), highlight=False)
    bounds = []
    if budget.parameters is not None:
        bounds.append(f"at most {budget.parameters:,} parameters")
    if budget.x_dense is not None:
        bounds.append(f"at most {budget.x_dense:g} x dense")
    config = suggestions[0].config
    within = " and ".join(bounds) if bounds else "no budget"
    table = new_table(f"{config.num_experts:,} experts, top-{config.router.top_k}; {within}; ranked by {rank_by}")
    table.add_column("#", justify="right")
    table.add_column("shape", no_wrap=True)
    for name in ("parameters", "per expert", "optimizer", "time", "x dense"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("pretrained", no_wrap=True)
    best = {id(s) for s in front([s for s in suggestions if s.lossless])}
    for position, suggestion in enumerate(suggestions, start=1):
        if position > 1 and not suggestion.lossless and suggestions[position - 2].lossless:
            table.add_section()
        whole, experts = suggestion.costs.whole("mpoe"), suggestion.costs.experts("mpoe")
        table.add_row(
            str(position),
            suggestion.name,
            count(whole.parameters),
            f"{suggestion.capacity:.2%}",
            size(whole.optimizer_bytes) if work.training else "-",
            duration(experts.seconds),
            ratio(suggestion.costs.x_dense()),
            "lossless" if suggestion.lossless else "truncated",
            style="bold" if id(suggestion) in best else None,
        )
    out.print(table)
    out.print(f"the first, for plan and convert: {suggestions[0].options}", highlight=False)
    show_notes(out, suggestion_notes(suggestions, inventory))


def show_hardware(hardware: Hardware, threads: int | None) -> None:
    """Print a device's measured numbers."""
    table = new_table(f"{hardware.name}, {threads} threads" if threads else hardware.name)
    table.add_column("number", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for name, rate in hardware.peak_flops._asdict().items():
        table.add_row(f"large {name} products", f"{rate / 1e9:,.1f} GFLOP/s")
    table.add_row("memory", f"{hardware.bandwidth / 1e9:,.1f} GB/s")
    table.add_row("cache", f"{hardware.cache_bandwidth / 1e9:,.1f} GB/s")
    if hardware.kind == "cpu":
        table.add_row("new memory", f"{hardware.new_memory_bandwidth / 1e9:,.1f} GB/s")
    for name, seconds in hardware.call_seconds._asdict().items():
        if hardware.kind == "cpu":
            table.add_row(f"call of a {name} product", duration(seconds))
    console().print(table)
