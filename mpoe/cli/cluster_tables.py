"""Tables of `mpoe plan` for several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from mpoe.cli.plan_notes import cluster_notes, scale_notes
from mpoe.cli.plan_tables import console, count, duration, new_table, ratio, show_notes, size

if TYPE_CHECKING:
    from mpoe.planning.cluster import Cluster, Placement
    from mpoe.planning.costs import Workload


def show_cluster(cluster: Cluster, placed: Sequence[Placement], work: Workload) -> None:
    """Print one column per design of what a device holds, sends and waits for."""
    out = console()
    hardware = work.device.hardware
    table = new_table(f"{cluster.nodes} nodes of {cluster.gpus_per_node} {escape(hardware.name)}: per device and step")
    table.add_column("", no_wrap=True)
    for placement in placed:
        table.add_column(_placement_name(placement), justify="right")
    memory = hardware.memory_bytes
    shard = max(cluster.devices, 1)

    def row(name: str, value: Any) -> None:
        table.add_row(name, *(value(placement) for placement in placed))

    row("parameters held", lambda p: count(p.parameters))
    row("parameters, gradients, optimizer" if work.training else "parameters", lambda p: size(p.memory_bytes))
    row("temporary weights", lambda p: size(p.temporary_bytes))
    row(f"fits {size(memory)}", lambda p: "yes" if p.memory_bytes <= memory else "no")
    if work.training:
        row(f"... sharded over all {shard}", lambda p: size(p.sharded_bytes))
    table.add_section()
    row("all-to-all of tokens, in the node", lambda p: size(p.all_to_all.node))
    row("all-to-all of tokens, between nodes", lambda p: size(p.all_to_all.link))
    if work.training:
        row("all-reduce of gradients, in the node", lambda p: size(p.all_reduce.node))
        row("all-reduce of gradients, between nodes", lambda p: size(p.all_reduce.link))
    row("bytes over the link between nodes", lambda p: size(p.traffic.link))
    table.add_section()
    row("communication", lambda p: duration(p.communication_seconds))
    row("forward and backward" if work.training else "forward", lambda p: duration(p.compute_seconds))
    if work.training:
        row("AdamW step", lambda p: duration(p.optimizer_seconds))
    row("step, nothing overlapping", lambda p: duration(p.seconds))
    row("x MPOE", lambda p: ratio(p.seconds / placed[0].seconds if placed[0].seconds else None))
    out.print()
    out.print(table)
    show_notes(out, cluster_notes(cluster, placed, work))


def show_scale(clusters: Sequence[Cluster], placed: Sequence[Sequence[Placement]], work: Workload) -> None:
    """Print MPOE and expert-parallel Switch on clusters of several sizes, one line each."""
    from mpoe.planning.cluster import break_even

    out = console()
    hardware = work.device.hardware
    table = new_table(f"{escape(hardware.name)}, {clusters[0].gpus_per_node} in a node: per device and step")
    table.add_column("GPUs", justify="right", no_wrap=True)
    table.add_column("design", no_wrap=True)
    for name in ("held", "state", "temp", "tokens", "grads", "wait", "step", "x MPOE", "even"):
        table.add_column(name, justify="right", no_wrap=True)
    for cluster, designs in zip(clusters, placed, strict=True):
        times = break_even(designs, cluster)
        even = "-" if times is None else f"{times * max(work.tokens.values()):,.0f}"
        for placement in designs[:2]:  # not Switch on every device: nobody would
            table.add_row(
                f"{cluster.devices:,}" if placement is designs[0] else "",
                _placement_name(placement, short=True),
                count(placement.parameters),
                size(placement.memory_bytes),
                size(placement.temporary_bytes),
                size(placement.all_to_all.bottleneck(cluster)),
                size(placement.all_reduce.bottleneck(cluster)),
                duration(placement.communication_seconds),
                duration(placement.seconds),
                ratio(placement.seconds / designs[0].seconds if designs[0].seconds else None),
                even if placement.expert_group > 1 else "",
            )
        table.add_section()
    out.print()
    out.print(table)
    show_notes(out, scale_notes(clusters, work))


def _placement_name(placement: Placement, short: bool = False) -> str:
    if placement.design == "mpoe":
        return "MPOE" if short else "MPOE, replicated"
    if placement.expert_group == 1:
        return "Switch, replicated"
    return f"Switch over {placement.expert_group}" if short else f"Switch, experts over {placement.expert_group}"
