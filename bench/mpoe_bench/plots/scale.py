"""The picture of docs/scale.md: `python -m mpoe_bench.plots.scale docs/images/scale.png`.

Its numbers are those of `mpoe plan t5-large --tokens 4096 --device h100 --gpus_per_node 8`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe.estimation.cluster import Cluster, Placement, placements
from mpoe.estimation.costs import Usage, model_costs
from mpoe.estimation.inventory import take_inventory
from mpoe.estimation.timing import Device
from mpoe.plotting import COLOURS, new_figure, plain_ticks

EXPERTS = (64, 512)
NODES = tuple(2**k for k in range(10))
GPUS = 8  # per node
TOKENS = 4096
NAMES = {"mpoe": "MPOE, replicated", "switch": "Switch, expert-parallel"}
MEMORY = 80  # GB of an H100

Sizes = dict[int, tuple[Placement, ...]]  # by number of GPUs


def predictions(experts: int) -> Sizes:
    """Predicted placements on clusters of `NODES` nodes."""
    inventory = take_inventory("t5-large")
    streams = (*inventory.streams, *(stream for stream, _, _ in inventory.rest))
    work = Usage(dict.fromkeys(streams, TOKENS), Device("h100", torch.bfloat16), training=True)
    costs, hardware = (
        model_costs(inventory, MPOEConfig(num_experts=experts, shape="separable"), work),
        work.device.hardware,
    )
    clusters = [Cluster(nodes, GPUS, hardware.network_bandwidth, hardware.link_bandwidth) for nodes in NODES]
    return {cluster.devices: placements(costs, cluster) for cluster in clusters}


def draw(file: Path, clusters: Mapping[int, Sizes]) -> None:
    """One GPU's memory, bytes sent to other nodes and communication time, against the number of GPUs.

    Args:
        clusters: experts -> the result of `predictions`.
    """
    figure, grid = new_figure(11.5, 4.6, 1, 3)
    panels = grid[0]
    for colour, (experts, sizes) in zip(COLOURS, clusters.items(), strict=False):
        gpus = list(sizes)
        for number, (design, name) in enumerate(NAMES.items()):  # the first two of the placements
            found = [placed[number] for placed in sizes.values()]
            assert {placement.design for placement in found} == {design}
            look = {"color": colour, "marker": "os"[number], "ls": ("-", "--")[number], "ms": 5}
            look["label"] = f"{name}, {experts} experts"
            panels[0].plot(gpus, [placement.memory_bytes / 1e9 for placement in found], **look)
            # A single node sends nothing to others.
            panels[1].plot(gpus[1:], [placement.traffic.link / 1e9 for placement in found[1:]], **look)
            panels[2].plot(gpus, [placement.communication_seconds * 1e3 for placement in found], **look)
    _finish(panels[0], gpus, "parameters, gradients, AdamW [GB]", (10, 20, 40, 80, 160, 320))
    panels[0].axhline(MEMORY, color="#444444", lw=1, ls=":")
    panels[0].annotate("an H100's memory", (gpus[-1], MEMORY), (0, 3), textcoords="offset points", ha="right", size=8)
    _finish(panels[1], gpus, "sent to other nodes in a step [GB]", (0.25, 0.5, 1, 2, 4))
    _finish(panels[2], gpus, "communication in a step, not overlapped [ms]", (10, 20, 40, 80, 160))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("One GPU of a cluster: T5-large, 4,096 tokens per GPU, predicted for H100", fontsize=10)
    figure.savefig(file)


def _finish(axes: Any, gpus: Sequence[int], ylabel: str, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    plain_ticks(axes.xaxis, gpus[::3], [f"{value:,}" for value in gpus[::3]])
    plain_ticks(axes.yaxis, ticks)
    axes.set_xlabel("GPUs, 8 in a node")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.25)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), {experts: predictions(experts) for experts in EXPERTS})
