"""The JSON of `mpoe plan --json`: bytes, seconds and counts, no formatted text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpoe.cli.plan_notes import cluster_notes, plan_notes, suggestion_notes
from mpoe.estimation.costs import DESIGNS

if TYPE_CHECKING:
    from mpoe.estimation.cluster import Cluster, Placement, Traffic
    from mpoe.estimation.costs import Cost, LayerCosts, MatrixCosts, ModelCosts, Usage
    from mpoe.estimation.inventory import Inventory
    from mpoe.estimation.suggest import Limits, Suggestion

SCHEMA = 1


def _cost(cost: Cost, dense: Cost, training: bool) -> dict[str, Any]:
    return {
        "parameters": cost.parameters,
        "optimizer_bytes": cost.optimizer_bytes if training else 0,
        "temporary_bytes": cost.temporary_bytes,
        "flops": cost.flops,
        "seconds": cost.seconds,
        "x_dense": cost.seconds / dense.seconds if dense.seconds else None,
    }


def _model(inventory: Inventory) -> dict[str, Any]:
    names = ("name", "source", "class_name", "parameters")
    return {**{name: getattr(inventory, name) for name in names}, "feed_forward_layers": len(inventory.layers)}


def _work(work: Usage) -> dict[str, Any]:
    return {
        "tokens": dict(work.tokens),
        "dtype": str(work.device.dtype).removeprefix("torch."),
        "device": work.device.hardware.name,
        "training": work.training,
        "mask_central": work.mask_central,
    }


def _matrix(matrix: MatrixCosts, training: bool) -> dict[str, Any]:
    plan = matrix.plan
    if plan is None:
        cost = matrix.costs["mpoe"]
        # The same for all phases together.
        phases = {"step": {"strategy": "hidden", "flops": cost.flops, "seconds": cost.seconds}}
    else:
        phases = {
            phase.phase: {"strategy": phase.strategy, "flops": phase.flops, "seconds": phase.seconds(plan.hardware)}
            for phase in plan.phases
        }
    return {
        "kind": matrix.matrix.kind,
        "in_features": matrix.matrix.rows,
        "out_features": matrix.matrix.columns,
        "shape": matrix.shape.to_dict(),
        "lossless": matrix.shape.is_full,
        "phases": phases,
        **{design: _cost(cost, matrix.costs["dense"], training) for design, cost in matrix.costs.items()},
    }


def _layer(layer: LayerCosts, training: bool) -> dict[str, Any]:
    return {
        "names": list(layer.names),
        "count": layer.count,
        "streams": list(layer.streams),
        "tokens": layer.tokens,
        "matrices": [_matrix(matrix, training) for matrix in layer.matrices],
        "routing": {**_cost(layer.routing, layer.routing, training), "x_dense": None},
        **{design: _cost(layer.cost(design), layer.cost("dense"), training) for design in DESIGNS},
    }


def plan_values(costs: ModelCosts) -> dict[str, Any]:
    """A plan; ``layers`` are groups of equal layers, with the costs of one layer."""
    training = costs.workload.training
    adamw = {d: costs.optimizer_seconds(costs.updated(d)) for d in DESIGNS} if training else None
    return {
        "schema": SCHEMA,
        "kind": "plan",
        "model": _model(costs.inventory),
        "work": _work(costs.workload),
        "config": costs.config.to_dict(),
        "layers": [_layer(layer, training) for layer in costs.layers],
        "totals": {
            "feed_forward": {d: _cost(costs.experts(d), costs.experts("dense"), training) for d in DESIGNS},
            "rest": {**_cost(costs.rest, costs.rest, training), "x_dense": None},
            "whole": {d: _cost(costs.whole(d), costs.whole("dense"), training) for d in DESIGNS},
            "optimizer_seconds": adamw,
        },
        "notes": plan_notes(costs),
    }


def suggestion_values(
    suggestions: Sequence[Suggestion], inventory: Inventory, work: Usage, budget: Limits
) -> dict[str, Any]:
    """Suggestions, best first."""
    return {
        "schema": SCHEMA,
        "kind": "suggestions",
        "model": _model(inventory),
        "work": _work(work),
        "budget": {"max_parameters": budget.parameters, "max_time": budget.x_dense},
        "suggestions": [
            {
                "name": s.name,
                "options": s.options,
                "config": s.config.to_dict(),
                "lossless": s.lossless,
                "capacity": s.capacity,
                "parameters": s.parameters,
                "optimizer_bytes": s.costs.whole("mpoe").optimizer_bytes if work.training else 0,
                "feed_forward_seconds": s.costs.experts("mpoe").seconds,
                "x_dense": s.costs.x_dense(),
            }
            for s in suggestions
        ],
        "notes": suggestion_notes(suggestions, inventory),
    }


def _traffic(traffic: Traffic) -> dict[str, Any]:
    return {"node_bytes": traffic.node, "link_bytes": traffic.link, "calls": traffic.calls}


def cluster_values(cluster: Cluster, placed: Sequence[Placement], work: Usage) -> dict[str, Any]:
    """What a device holds, sends and waits for, per design; ``break_even`` as in `mpoe.estimation.cluster`."""
    from mpoe.estimation.cluster import break_even

    return {
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "network_bytes_per_second": cluster.network_bandwidth,
        "link_bytes_per_second": cluster.link_bandwidth,
        "break_even": break_even(placed, cluster),
        "device_memory_bytes": work.device.hardware.memory_bytes,
        "designs": [
            {
                "design": p.design,
                "expert_group": p.expert_group,
                "parameters": p.parameters,
                "memory_bytes": p.memory_bytes,
                "temporary_bytes": p.temporary_bytes,
                "fits": p.memory_bytes <= work.device.hardware.memory_bytes,
                "sharded_bytes": p.sharded_bytes,
                "all_to_all": _traffic(p.all_to_all),
                "all_reduce": _traffic(p.all_reduce),
                "compute_seconds": p.compute_seconds,
                "optimizer_seconds": p.optimizer_seconds,
                "communication_seconds": p.communication_seconds,
                "seconds": p.seconds,
            }
            for p in placed
        ],
        "notes": cluster_notes(cluster, placed, work),
    }
