"""Several devices: replicated MPO experts against expert-parallel Switch, bytes per link and step time.

Every device processes its own T tokens in a step (data parallelism). G = nodes * devices per node.

MPOE replicates everything. The only traffic is the all-reduce of gradients, in two levels (reduce-scatter inside the
node, all-reduce of a shard between nodes, all-gather inside): for B bytes of gradients a device sends
``2 (g - 1) / g * B`` inside its node of g devices and ``2 (n - 1) / n * B / g`` to the other nodes of n. Masked central
cores have no gradients.

Switch distributes every layer's E experts over ``P = gcd(E, G)`` devices, filling nodes first, so each holds E / P; the
rest is replicated. Traffic (GShard, Lepikhin et al., ICLR 2021, section 3.2):

* all-to-all: every mixture layer sends its ``T * K`` rows of the model size to their experts (dispatch) and back
  (combine), and the backward pass sends the gradients the same two ways: 4 times ``T K d * element size`` per layer and
  training step, 2 in inference. Under uniform routing the part ``(P - m) / P`` crosses nodes and ``(m - 1) / P`` stays
  inside, m = min(P, g). Buffers padded to a capacity send more.
* all-reduce: the replicated gradients over all G devices, each expert's over its ``G / P`` replicas.

Time: bytes over the speed of the links, inside the node and between nodes one after the other, plus `LATENCY` per
collective call. Nothing overlaps with computation and links run at full speed: the same assumptions for both designs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpoe.estimation.costs import GRADIENT_BYTES, OPTIMIZER_BYTES, TRAINED_PARAMETER_BYTES, ModelCosts, switch_seconds

LATENCY = 20e-6  # seconds of one collective call, whatever its size


@dataclass(frozen=True)
class Cluster:
    """``nodes`` of ``gpus_per_node`` devices.

    Attributes:
        network_bandwidth: bytes/s that one device sends to other nodes.
        link_bandwidth: bytes/s that one device sends inside its node.
    """

    nodes: int
    gpus_per_node: int
    network_bandwidth: float
    link_bandwidth: float

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def devices(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Traffic:
    """Bytes one device sends in a step: inside its node, and over its link to other nodes; and collective calls."""

    node: float = 0.0
    link: float = 0.0
    calls: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.node + other.node, self.link + other.link, self.calls + other.calls)

    def seconds(self, cluster: Cluster) -> float:
        inside, across = self.node / cluster.link_bandwidth, self.link / cluster.network_bandwidth
        return inside + across + self.calls * LATENCY

    def bottleneck(self, cluster: Cluster) -> float:
        """Bytes over the cluster's slower kind of link: between nodes, or inside a single node."""
        return self.link if cluster.nodes > 1 else self.node


def all_reduce(size: float, nodes: int, gpus: int) -> Traffic:
    """Sum ``size`` bytes over ``nodes * gpus`` devices, in two levels; see the module's text."""
    if nodes * gpus == 1 or not size:
        return Traffic()
    return Traffic(2 * (gpus - 1) / gpus * size, 2 * (nodes - 1) / nodes * size / gpus, 1)


def all_to_all(size: float, group: int, gpus: int) -> Traffic:
    """Every device sends ``size`` bytes evenly to a group that fills nodes of ``gpus`` devices first."""
    if group == 1 or not size:
        return Traffic()
    inside = min(group, gpus)
    return Traffic((inside - 1) / group * size, (group - inside) / group * size, 1)


@dataclass(frozen=True)
class Placement:
    """One design on a cluster, per device.

    Attributes:
        design: ``mpoe`` or ``switch``.
        expert_group: devices that share a layer's experts; 1 = replicated.
        parameters: number on one device. memory_bytes: parameters, gradients and optimizer in training; parameters in
            inference. No activations.
        temporary_bytes: additional peak of temporary weight memory of one product.
        sharded_bytes: ``memory_bytes`` if the whole model is sharded over all devices (ZeRO-3, FSDP).
        all_to_all: of tokens; ``all_reduce``: of gradients.
        compute_seconds: forward (and backward) of the whole model.
        optimizer_seconds: AdamW on the device's parameters.
        communication_seconds: see the module docstring.
    """

    design: str
    expert_group: int
    parameters: int
    memory_bytes: int
    temporary_bytes: int
    sharded_bytes: int
    all_to_all: Traffic
    all_reduce: Traffic
    compute_seconds: float
    optimizer_seconds: float
    communication_seconds: float

    @property
    def traffic(self) -> Traffic:
        return self.all_to_all + self.all_reduce

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.optimizer_seconds + self.communication_seconds


def _memory(parameters: int, costs: ModelCosts) -> int:
    work = costs.workload
    each = TRAINED_PARAMETER_BYTES + GRADIENT_BYTES + OPTIMIZER_BYTES if work.training else work.device.element_size
    return parameters * each


def place_mpoe(costs: ModelCosts, cluster: Cluster) -> Placement:
    """MPO experts, replicated on every device."""
    parameters, updated = costs.whole("mpoe").parameters, costs.updated("mpoe")
    training = costs.workload.training
    reduce = all_reduce(updated * GRADIENT_BYTES, cluster.nodes, cluster.gpus_per_node) if training else Traffic()
    return Placement(
        "mpoe",
        1,
        parameters,
        _memory(parameters, costs),
        costs.whole("mpoe").temporary_bytes,
        _memory(parameters, costs) // cluster.devices,
        Traffic(),
        reduce,
        costs.whole("mpoe").seconds,
        costs.optimizer_seconds(updated),
        reduce.seconds(cluster),
    )


def place_switch(costs: ModelCosts, cluster: Cluster, replicated: bool = False) -> Placement:
    """Dense experts, distributed over ``gcd(E, G)`` devices, or replicated on every device."""
    work, experts, top_k = costs.workload, costs.config.num_experts, costs.config.top_k
    group = 1 if replicated else math.gcd(experts, cluster.devices)
    local = experts // group
    expert_parameters = sum(m.matrix.elements for layer in costs.layers for m in layer.matrices * layer.count) * local
    common = costs.whole("switch").parameters - expert_parameters * group
    tokens = Traffic()
    compute = costs.rest.seconds
    for layer in costs.layers:
        slots = layer.tokens * top_k
        rows = slots * layer.matrices[0].matrix.rows * work.device.element_size
        exchange = all_to_all(rows, group, cluster.gpus_per_node)
        for _ in range(layer.count * (4 if work.training else 2)):
            tokens += exchange
        own = sum(switch_seconds(m.matrix, local, slots, work) for m in layer.matrices)
        compute += layer.count * (own + layer.routing.seconds)
    reduce = Traffic()
    if work.training:
        reduce = all_reduce(common * GRADIENT_BYTES, cluster.nodes, cluster.gpus_per_node)
        inside = max(1, cluster.gpus_per_node // group)
        across = cluster.devices // group // inside
        reduce += all_reduce(expert_parameters * GRADIENT_BYTES, across, inside)
    parameters = common + expert_parameters
    return Placement(
        "switch",
        group,
        parameters,
        _memory(parameters, costs),
        costs.whole("switch").temporary_bytes,
        _memory(costs.whole("switch").parameters, costs) // cluster.devices,
        tokens,
        reduce,
        compute,
        costs.optimizer_seconds(parameters),
        (tokens + reduce).seconds(cluster),
    )


def placements(costs: ModelCosts, cluster: Cluster) -> tuple[Placement, ...]:
    """MPOE replicated, Switch expert-parallel and, if different, Switch replicated."""
    found = [place_mpoe(costs, cluster), place_switch(costs, cluster)]
    if found[1].expert_group > 1:
        found.append(place_switch(costs, cluster, replicated=True))
    return tuple(found)


def break_even(placed: Sequence[Placement], cluster: Cluster) -> float | None:
    """The multiple of the planned tokens at which Switch sends as much as replicated MPO experts; None = never.

    The all-to-all grows with the tokens of a step, the all-reduce does not. Counts the links between nodes, or those
    inside if there is one node.
    """
    mpoe, switch = placed[:2]
    per_step = switch.all_to_all.bottleneck(cluster)
    if not per_step:
        return None
    return max(0.0, (mpoe.all_reduce.bottleneck(cluster) - switch.all_reduce.bottleneck(cluster)) / per_step)
