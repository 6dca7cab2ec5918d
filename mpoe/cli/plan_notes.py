"""The assumptions of `mpoe plan`, as lines for the terminal and the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpoe.estimation.cluster import Cluster, Placement
    from mpoe.estimation.costs import ModelCosts, Usage
    from mpoe.estimation.inventory import Inventory
    from mpoe.estimation.suggest import Suggestion


def plan_notes(costs: ModelCosts) -> list[str]:
    """Assumptions of a plan."""
    work = costs.workload
    notes = [
        "MPOE: MPO experts that share a central core per matrix. Switch: as many dense experts. dense: the model as "
        "it is. All three see the same tokens; x dense divides predicted times.",
    ]
    if work.training:
        notes.append(
            "optimizer: AdamW, two float32 moments (8 bytes) per parameter, all trained; float32 parameters and "
            "gradients take 8 bytes more."
        )
    notes += [
        "temporary: weight memory beside the parameters (at most two experts' weights of one matrix), not activations.",
        "time: every product's arithmetic, memory traffic and calls, as the planner's hardware table has them "
        f"({_hardware(work)}); balanced routing, no dropped tokens; no biases, activations or norms.",
        "rest: embeddings, attention, norms; its FLOP and time are those of its matrix maps (projections, "
        "language-model head), without attention scores.",
    ]
    truncated = [m for layer in costs.layers for m in layer.matrices if not m.shape.is_full]
    if truncated:
        notes.append(TRUNCATED)
    return notes


TRUNCATED = (
    "truncated bonds lose most of a pretrained matrix (relative error .59 to .93 at bonds 128 to 32): "
    "for training from scratch, not for converting."
)


def _hardware(work: Usage) -> str:
    hardware = work.device.hardware
    peak = hardware.flops_per_second(work.device.dtype) / 1e12
    return f"{hardware.name}: {peak:.3g} TFLOP/s reachable, {hardware.bandwidth / 1e9:,.0f} GB/s"


def suggestion_notes(suggestions: Sequence[Suggestion], inventory: Inventory) -> list[str]:
    """What a list of suggestions means."""
    notes = [
        f"parameters: of the whole model (dense: {inventory.parameters:,}). per expert: auxiliary parameters over the "
        "dense layer's; expert capacity grows with it. time and x dense: of the feed-forward layers, as the planner "
        "predicts them. lossless: a pretrained matrix is kept whole.",
        "separable L/R: --shape separable --separable_left L --separable_right R; light P: --shape light --light_p P; "
        "bond B: --max_bond B. Of each family those that no other one beats in both capacity and time; *: beaten by "
        "no lossless one listed. Left out: experts that own less than 0.1% of a dense layer, and chains with fewer "
        "than half of its numbers, where others meet the budget.",
    ]
    if any(not s.lossless for s in suggestions):
        notes.append(TRUNCATED)
    return notes


def cluster_notes(cluster: Cluster, placed: Sequence[Placement], work: Usage) -> list[str]:
    """Formulas of the estimate; see `mpoe.estimation.cluster`."""
    from mpoe.estimation.cluster import break_even

    n, g = cluster.nodes, cluster.gpus_per_node
    notes = [
        f"n = {n} nodes of g = {g} devices, each with its own tokens; between nodes "
        f"{cluster.network_bandwidth * 8e-9:,.0f} Gbit/s and in the node {cluster.link_bandwidth * 8e-9:,.0f} Gbit/s "
        "per device and direction.",
    ]
    if work.training:
        notes.append(
            "all-reduce of B bytes of float32 gradients: 2 (g-1)/g B in the node, 2 (n-1)/n B/g between nodes."
        )
    ways = "4 (dispatch and combine, forward and backward)" if work.training else "2 (dispatch and combine)"
    group = max(p.expert_group for p in placed)
    notes.append(
        f"all-to-all: {ways} x T K d x {work.device.element_size} bytes per mixture layer; (P-m)/P of them cross nodes "
        f"and (m-1)/P stay inside; P = gcd(experts, n g) = {group} devices share the experts, m = min(P, g)."
    )
    if work.training and cluster.devices > 1:
        times = break_even(placed, cluster)
        where = "between nodes" if n > 1 else "in the node"
        if times is None:
            notes.append(f"no all-to-all {where}: more tokens per step do not change what is sent there.")
        else:
            notes.append(
                f"the all-reduce is once a step whatever its tokens, the all-to-all grows with them: Switch sends more "
                f"{where} above {times:.2g} x these tokens per device and step."
            )
    if work.training:
        notes.append(
            "memory: 4 bytes parameter + 4 gradient + 8 AdamW, float32; no activations. Replicas are "
            "counted whole; the sharded line is what ZeRO-3 / FSDP over all devices would hold."
        )
    else:
        notes.append(f"memory: {work.device.element_size} bytes per parameter; no activations, no cache.")
    notes.append(
        "time: no overlap, full link speed, 20 us per collective call; experts evenly loaded, unpadded buffers."
    )
    return notes


def scale_notes(clusters: Sequence[Cluster], work: Usage) -> list[str]:
    """What the columns of a comparison over several clusters mean."""
    state = "float32 parameters, gradients and AdamW (16 bytes each)" if work.training else "parameters"
    return [
        f"held: parameters on a device; state: their {state}; temp: weights rebuilt for one product.",
        "tokens, grads: bytes a device sends in all-to-all and all-reduce over its link to other nodes (with one "
        "node: inside it). wait: all communication, inside and between nodes; step: with computation and AdamW, "
        "nothing overlapping.",
        "even: tokens per device above which expert-parallel Switch sends more over that link than MPOE; 0 = always, "
        "- = whatever the tokens, it sends none.",
        f"links: {clusters[0].network_bandwidth * 8e-9:,.0f} Gbit/s between nodes, "
        f"{clusters[0].link_bandwidth * 8e-9:,.0f} Gbit/s in the node, per device and direction. Formulae: with one "
        "value of --nodes.",
    ]
