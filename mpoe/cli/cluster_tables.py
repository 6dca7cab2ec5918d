"""Tables of `mpoe plan` for several devices, from the values of its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from mpoe.cli.plan_notes import scale_notes
from mpoe.cli.plan_tables import console, count, duration, new_table, ratio, show_notes, size

if TYPE_CHECKING:
    from mpoe.estimation.cluster import Cluster
    from mpoe.estimation.costs import Usage

Values = Mapping[str, Any]


def show_cluster(values: Values, work: Usage) -> None:
    """Print what a device holds, sends and waits for, one column per design.

    Args:
        values: from `mpoe.cli.plan_json.cluster_values`.
        work: a description of the devices' work.
    """
    out, designs = console(), values["designs"]
    hardware = escape(work.device.hardware.name)
    table = new_table(f"{values['nodes']} nodes of {values['gpus_per_node']} {hardware}: per device and step")
    table.add_column("", no_wrap=True)
    for design in designs:
        table.add_column(_name(design), justify="right")
    training, shard = work.training, max(values["nodes"] * values["gpus_per_node"], 1)

    def row(label: str, cell: Callable[[Values], str], shown: bool = True) -> None:
        if shown:
            table.add_row(label, *map(cell, designs))

    row("parameters held", lambda d: count(d["parameters"]))
    row("parameters, gradients, optimizer" if training else "parameters", lambda d: size(d["memory_bytes"]))
    row("temporary weights", lambda d: size(d["temporary_bytes"]))
    row(f"fits {size(values['device_memory_bytes'])}", lambda d: "yes" if d["fits"] else "no")
    row(f"... sharded over all {shard}", lambda d: size(d["sharded_bytes"]), training)
    table.add_section()
    row("all-to-all of tokens, in the node", lambda d: size(d["all_to_all"]["node_bytes"]))
    row("all-to-all of tokens, between nodes", lambda d: size(d["all_to_all"]["link_bytes"]))
    row("all-reduce of gradients, in the node", lambda d: size(d["all_reduce"]["node_bytes"]), training)
    row("all-reduce of gradients, between nodes", lambda d: size(d["all_reduce"]["link_bytes"]), training)
    both = ("all_to_all", "all_reduce")
    row("bytes over the link between nodes", lambda d: size(sum(d[kind]["link_bytes"] for kind in both)))
    table.add_section()
    row("communication", lambda d: duration(d["communication_seconds"]))
    row("forward and backward" if training else "forward", lambda d: duration(d["compute_seconds"]))
    row("AdamW step", lambda d: duration(d["optimizer_seconds"]), training)
    row("step, nothing overlapping", lambda d: duration(d["seconds"]))
    row("x MPOE", lambda d: _over(d, designs[0]))
    out.print()
    out.print(table)
    show_notes(out, values["notes"])


def show_scale(found: Sequence[Values], clusters: Sequence[Cluster], work: Usage) -> None:
    """Print MPOE and expert-parallel Switch on clusters of several sizes, one line each."""
    out = console()
    hardware = escape(work.device.hardware.name)
    table = new_table(f"{hardware}, {found[0]['gpus_per_node']} in a node: per device and step")
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("design", no_wrap=True)
    for name in ("held", "state", "temp", "tokens", "grads", "wait", "step", "x MPOE", "even"):
        table.add_column(name, justify="right", no_wrap=True)
    for values in found:
        times, first = values["break_even"], values["designs"][0]
        even = "-" if times is None else f"{times * max(work.tokens.values()):,.0f}"
        slowest = "link_bytes" if values["nodes"] > 1 else "node_bytes"
        for design in values["designs"][:2]:  # without Switch replicated on every device, which is unrealistic
            table.add_row(
                f"{values['nodes'] * values['gpus_per_node']:,}" if design is first else "",
                _name(design, short=True),
                count(design["parameters"]),
                size(design["memory_bytes"]),
                size(design["temporary_bytes"]),
                size(design["all_to_all"][slowest]),
                size(design["all_reduce"][slowest]),
                duration(design["communication_seconds"]),
                duration(design["seconds"]),
                _over(design, first),
                even if design["expert_group"] > 1 else "",
            )
        table.add_section()
    out.print()
    out.print(table)
    show_notes(out, scale_notes(clusters, work))


def _over(design: Values, first: Values) -> str:
    return ratio(design["seconds"] / first["seconds"] if first["seconds"] else None)


def _name(design: Values, short: bool = False) -> str:
    if design["design"] == "mpoe":
        return "MPOE" if short else "MPOE, replicated"
    group = design["expert_group"]
    if group == 1:
        return "Switch, replicated"
    return f"Switch over {group}" if short else f"Switch, experts over {group}"
