"""Tables of `mpoe plan`, made to read well at 100 columns and more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from mpoe.estimation.costs import LayerCosts, ModelCosts, Usage
    from mpoe.estimation.inventory import Inventory
    from mpoe.estimation.suggest import Suggestion
    from mpoe_kernels.planner import Hardware

NAMES = {"mpoe": "MPOE", "switch": "Switch", "dense": "dense"}
_PLAIN_WIDTH = 110  # if the width is unknown, as in a pipe


def console() -> Console:
    """The console; wide enough for the tables if there is no terminal."""
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
    """``1.17``; a dash if the denominator is missing."""
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def _cost_cells(cost: Mapping[str, Any], training: bool) -> list[str]:
    """Cells of a cost from the JSON."""
    return [
        count(cost["parameters"]),
        *([size(cost["optimizer_bytes"])] if training else []),
        size(cost["temporary_bytes"]) if cost["temporary_bytes"] else "-",
        operations(cost["flops"]),
        duration(cost["seconds"]),
        ratio(cost["x_dense"]),
    ]


def new_table(title: str) -> Table:
    """An empty table with little space between columns."""
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


def _head(inventory: Inventory, work: Usage) -> str:
    hardware = work.device.hardware
    tokens = ", ".join(f"{number:,} {stream} tokens" for stream, number in work.tokens.items())
    tokens = tokens.replace(" main tokens", " tokens")  # the only stream of GPT-2 and BERT needs no name
    phase = "training" if work.training else "inference"
    masked = ", central cores masked" if work.mask_central else ""
    return (
        f"[bold]{escape(inventory.name)}[/bold] ({escape(inventory.source)}; {inventory.class_name}, "
        f"{count(inventory.parameters)} parameters), {phase}{masked}: {tokens} a step, "
        f"{str(work.device.dtype).removeprefix('torch.')} on {escape(hardware.name)}"
    )


def show_plan(values: Mapping[str, Any], costs: ModelCosts, per_layer: bool = False, explain: bool = False) -> None:
    """Print a plan: the costs of every kind of layer, of the whole model, and what they assume.

    Args:
        values: from `mpoe.cli.plan_json.plan_values`.
        costs: the costs that it was made from; shapes and contraction plans are printed with their own descriptions.
        per_layer: list every layer.
        explain: say why the other strategies lost.
    """
    out = console()
    experts, top_k = costs.config.num_experts, costs.config.top_k
    out.print(_head(costs.inventory, costs.workload), highlight=False)
    shape = costs.config.shape if isinstance(costs.config.shape, str) else "given"
    out.print(f"{experts:,} experts, top-{top_k}, shape {shape}\n", highlight=False)
    training = values["work"]["training"]
    for layer, found in zip(values["layers"], costs.layers, strict=True):
        _show_layer(out, layer, found, training, explain)
    if per_layer:
        _show_every_layer(out, values["layers"], [item.name for item in costs.inventory.layers])
    _show_totals(out, values, training)
    show_notes(out, values["notes"])


def _layer_title(layer: Mapping[str, Any]) -> str:
    streams = " and ".join(s for s in layer["streams"] if s != "main")
    kind = f"{streams} feed-forward layer" if streams else "feed-forward layer"
    return f"{layer['count']} {kind}{'s' if layer['count'] > 1 else ''} of {layer['tokens']:,} tokens; of one:"


def _add_designs(
    table: Table, label: str, costs: Mapping[str, Any], training: bool, last: Sequence[str] = (), bold: bool = True
) -> None:
    """Add a row for each design; ``last``: an additional cell for each."""
    for index, (design, name) in enumerate(NAMES.items()):
        style = "bold" if bold and design == "mpoe" else ""
        cells = _cost_cells(costs[design], training)
        table.add_row("" if index else label, name, *cells, *last[index : index + 1], style=style)


def _show_layer(out: Console, layer: Mapping[str, Any], found: LayerCosts, training: bool, explain: bool) -> None:
    last = "forward / backward" if training else "strategy"
    table = _cost_table(_layer_title(layer), "matrix", training, last)
    for matrix in layer["matrices"]:
        label = f"{matrix['kind']} {matrix['in_features']}x{matrix['out_features']}"
        strategies = " / ".join(dict.fromkeys(phase["strategy"] for phase in matrix["phases"].values()))
        _add_designs(table, label, matrix, training, (strategies, "GEMM per expert", "one GEMM"), bold=False)
        table.add_section()
    table.add_row("routing", "both", *_cost_cells(layer["routing"], training)[:-1], "", "router, copies")
    table.add_section()
    _add_designs(table, "layer", layer, training, ("", "", ""))
    out.print(table)
    for each in found.matrices:
        if each.plan is None:
            own = each.costs["mpoe"].parameters - each.matrix.elements
            out.print(f"{each.matrix.kind}: dense, {own:,} numbers of all experts' blocks beside it", highlight=False)
            continue
        lossless = "lossless" if each.shape.is_full else "truncated"
        share = each.shape.auxiliary_parameters / each.matrix.elements
        text = f"{each.matrix.kind}: {each.shape}; {lossless}, {share:.2%} of the matrix per expert"
        out.print(escape(text), highlight=False)
        if explain:
            out.print(escape(str(each.plan)), highlight=False)
    out.print()


def _show_every_layer(out: Console, layers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    table = new_table("Every layer: parameters of the three designs, time of MPOE")
    table.add_column("layer", no_wrap=True)
    for name in ("tokens", *NAMES.values(), "time", "x dense"):
        table.add_column(name, justify="right", no_wrap=True)
    group_of = {name: layer for layer in layers for name in layer["names"]}
    for name in names:
        layer = group_of[name]
        parameters = [count(layer[design]["parameters"]) for design in NAMES]
        cost = layer["mpoe"]
        table.add_row(name, f"{layer['tokens']:,}", *parameters, duration(cost["seconds"]), ratio(cost["x_dense"]))
    out.print(table)
    out.print()


def _show_totals(out: Console, values: Mapping[str, Any], training: bool) -> None:
    table, totals = _cost_table("In total", "part", training), values["totals"]
    number = sum(layer["count"] for layer in values["layers"])
    _add_designs(table, f"{number} feed-forward layers", totals["feed_forward"], training, bold=False)
    table.add_section()
    table.add_row("rest of the model", "all", *_cost_cells(totals["rest"], training)[:-1], "")
    table.add_section()
    _add_designs(table, "whole model", totals["whole"], training)
    if training:
        table.add_section()
        seconds = totals["optimizer_seconds"]
        for design, name in NAMES.items():
            cells = ["", "", "", "", duration(seconds[design]), ratio(seconds[design] / seconds["dense"])]
            table.add_row("AdamW step" if design == "mpoe" else "", name, *cells)
    out.print(table)


def show_notes(out: Console, notes: Sequence[str]) -> None:
    grid = Table.grid(padding=(0, 1))
    for note in notes:
        grid.add_row("*", escape(note))
    out.print(grid, style="dim", highlight=False)


def show_suggestions(
    values: Mapping[str, Any], suggestions: Sequence[Suggestion], inventory: Inventory, work: Usage, rank_by: str
) -> None:
    """Print the shapes that meet a budget; ``values``: as `mpoe.cli.plan_json.suggestion_values` gives them."""
    from mpoe.estimation.suggest import front

    out = console()
    out.print(_head(inventory, work), highlight=False)
    most, x_dense = values["budget"]["max_parameters"], values["budget"]["max_time"]
    bounds = [
        *([] if most is None else [f"at most {most:,} parameters"]),
        *([] if x_dense is None else [f"at most {x_dense:g} x dense"]),
    ]
    config = suggestions[0].config
    within = " and ".join(bounds) if bounds else "no budget"
    table = new_table(f"{config.num_experts:,} experts, top-{config.top_k}; {within}; ranked by {rank_by}")
    # All of it fits a terminal of 80 columns.
    table.add_column("shape", no_wrap=True)
    for name in ("para-\nmeters", "per\nexpert", "optim-\nizer", "predicted\ntime", "predicted\nx dense"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("lossless", no_wrap=True)
    best = {one.name for one in front([one for one in suggestions if one.lossless])}
    lossless = True
    for position, row in enumerate(values["suggestions"], start=1):
        if lossless and not row["lossless"] and position > 1:
            table.add_section()
        lossless = row["lossless"]
        table.add_row(
            f"{row['name']} *" if row["name"] in best else row["name"],  # a pipe has no bold type
            count(row["parameters"]),
            f"{row['capacity']:.2%}",
            size(row["optimizer_bytes"]) if work.training else "-",
            duration(row["feed_forward_seconds"]),
            ratio(row["x_dense"]),
            "yes" if lossless else "no",
            style="bold" if row["name"] in best else None,
        )
    out.print(table)
    out.print(f"the first, for plan and convert: {values['suggestions'][0]['options']}", highlight=False)
    show_notes(out, values["notes"])


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
