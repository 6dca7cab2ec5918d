"""Parameters, FLOPs and memory of every feed-forward layer with MPO experts, with dense experts, and as it is.

All numbers are exact and follow from shapes:

* parameters: MPO experts share one central core, ``central + E * auxiliary`` per matrix; dense experts ``E * I * F``;
  dense ``I * F``; both mixtures add a router ``[I, E]``. Biases shared by experts count as the rest of the model.
* FLOPs: those of the contractions that `mpoe_kernels.plan_contraction` ranks first for MPO experts, ``2 N I F`` for the
  others (N = T * K rows; dense: T), three times that with the backward pass; a router ``2 T I E``.
* around hidden-side experts the projections are dense, and every expert owns a block per projection; beside neurons the
  network is dense, and every expert owns rows of each projection. With the backward pass, which recomputes the input of
  the activation, what an expert owns takes part in four products of up and gate_proj and in three of down.

Tokens are those of one device in a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe.estimation.inventory import Inventory, Layer, Matrix
from mpoe_kernels import plan_contraction

STATE_BYTES = 16  # of a trained parameter: itself, its gradient and AdamW's two moments, in float32
DESIGNS = ("mpoe", "switch", "dense")


@dataclass(frozen=True)
class Usage:
    """The workload.

    Attributes:
        tokens: per stream (``encoder``, ``decoder`` or ``main``), tokens of one device in one step.
        dtype: of weights, activations and products.
        training: forward and backward, rather than forward.
        mask_central: the gradient mask is on: the central core gets no gradient in this step.
    """

    tokens: Mapping[str, int]
    dtype: torch.dtype
    training: bool
    mask_central: bool = False

    @property
    def passes(self) -> int:
        """Number of products of a dense linear in the step: the output and, in training, the two gradients."""
        return 3 if self.training else 1

    def values(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "tokens": dict(self.tokens), "dtype": str(self.dtype).removeprefix("torch.")}


@dataclass(frozen=True)
class Cost:
    """Additive costs of a part of the model: elements, FLOPs of a step, and the peak of weights that a product rebuilds
    (for a sum, the larger)."""

    parameters: int = 0
    flops: int = 0
    temporary_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        temporary = max(self.temporary_bytes, other.temporary_bytes)
        return Cost(self.parameters + other.parameters, self.flops + other.flops, temporary)

    def values(self, usage: Usage, dense: Cost | None = None) -> dict[str, Any]:
        """For JSON: with the bytes of weights and of the training's state, and FLOPs relative to those of ``dense``."""
        return {
            **vars(self),
            "weight_bytes": self.parameters * usage.dtype.itemsize,
            "state_bytes": self.parameters * STATE_BYTES if usage.training else 0,
            "x_dense": self.flops / dense.flops if dense is not None and dense.flops else None,
        }


Costs = Mapping[str, Cost]  # by design


def _sum(parts: Iterable[Costs]) -> Costs:
    parts = list(parts)
    return {design: sum((part[design] for part in parts), Cost()) for design in DESIGNS}


def _values(costs: Costs, usage: Usage) -> dict[str, Any]:
    return {design: cost.values(usage, costs["dense"]) for design, cost in costs.items()}


def model_costs(inventory: Inventory, config: MPOEConfig, usage: Usage) -> dict[str, Any]:
    """Costs of a model under a configuration, for JSON.

    Returns:
        ``config``; ``layers``: groups of equal layers, each with its ``matrices``, ``router`` and the costs of one
        layer by design; ``totals``: ``feed_forward`` (all of them), ``rest`` (the same in all designs) and ``whole``.
        A cost has the fields of `Cost.values`; a matrix also ``lossless`` (no bond is truncated) and its ``strategy``.

    Raises:
        ValueError: a shape that does not match a layer, tokens missing for a stream.
    """
    missing = [stream for stream in inventory.streams if stream not in usage.tokens]
    if missing:
        raise ValueError(f"tokens must be given for {', '.join(inventory.streams)}; missing: {', '.join(missing)}")
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in inventory.layers:
        groups.setdefault((layer.matrices, layer.has_bias, usage.tokens[layer.stream]), []).append(layer)
    layers, every = [], []
    for alike in groups.values():
        first, tokens = alike[0], usage.tokens[alike[0].stream]
        matrices = [_matrix_costs(m, config, usage, tokens, first.has_bias) for m in first.matrices]
        elements = first.model_size * config.num_experts
        router = Cost(elements, 2 * tokens * elements * usage.passes)
        costs = _sum([*(own for _, own in matrices), {"mpoe": router, "switch": router, "dense": Cost()}])
        every += [costs] * len(alike)
        values = {"names": [layer.name for layer in alike], "count": len(alike), "tokens": tokens}
        values |= {"streams": list(dict.fromkeys(layer.stream for layer in alike)), "router": router.values(usage)}
        layers.append({**values, "matrices": [own for own, _ in matrices], **_values(costs, usage)})
    experts = _sum(every)
    maps = sum(count * 2 * usage.tokens[s] * rows * columns for (s, rows, columns), count in inventory.rest.items())
    rest = Cost(inventory.parameters - inventory.ffn_elements, maps * usage.passes)
    whole = {design: cost + rest for design, cost in experts.items()}
    totals = {"feed_forward": _values(experts, usage), "rest": rest.values(usage), "whole": _values(whole, usage)}
    return {"config": config.to_dict(), "layers": layers, "totals": totals}


def _matrix_costs(
    matrix: Matrix, config: MPOEConfig, usage: Usage, tokens: int, has_bias: bool
) -> tuple[dict[str, Any], Costs]:
    """Of one projection on ``tokens`` tokens, for JSON and by design; ``has_bias``: of the network's first
    projection."""
    experts, slots = config.num_experts, tokens * config.top_k
    dense = Cost(matrix.elements, 2 * tokens * matrix.elements * usage.passes)
    switch = Cost(experts * matrix.elements, 2 * slots * matrix.elements * usage.passes)
    shape = None if config.is_neurons else config.shape_for(matrix.kind, matrix.rows, matrix.columns)
    strategy, backward = "neurons" if shape is None else "hidden", None
    products = 1 if not usage.training else 3 if matrix.kind == "down" else 4
    if config.is_hidden:  # blocks [b, b], every group of hidden units a row
        hidden = matrix.rows if matrix.kind == "down" else matrix.columns
        block = config.hidden_block(hidden)
        weights = experts * (hidden // block if config.block_per_group else 1)
        mpoe = dense + Cost(weights * block * block, 2 * slots * hidden * block * products)
    elif shape is None:  # rows of the model's size or the latent one, and two matrices that latent experts share
        size, neurons = matrix.columns if matrix.kind == "down" else matrix.rows, config.neurons or 0
        row = size if config.latent is None else config.latent
        biases = experts * neurons if (has_bias or config.expert_bias) and matrix.kind == "up" else 0
        mpoe = dense + Cost(experts * neurons * row + biases, 2 * slots * neurons * row * products)
        if config.latent is not None and matrix.kind != "gate_proj":
            mpoe += Cost(size * row, 2 * tokens * size * row * usage.passes)
    else:
        routing = {"top_k": config.top_k, "training": usage.training, "mask_central": usage.mask_central}
        plan = plan_contraction(shape, experts, tokens, usage.dtype, **routing)  # type: ignore[arg-type]
        strategy, backward = plan.strategy, plan.backward_strategy
        mpoe = Cost(shape.parameters(experts), plan.flops, plan.temporary_bytes)
    costs = {"mpoe": mpoe, "switch": switch, "dense": dense}
    values = {"kind": matrix.kind, "in_features": matrix.rows, "out_features": matrix.columns}
    values |= {"shape": None if shape is None else shape.to_dict(), "lossless": shape is None or shape.is_full}
    values |= {"strategy": strategy, "backward_strategy": backward}
    return {**values, **_values(costs, usage)}, costs
