"""Parameters, FLOPs and memory of every feed-forward layer with MPO experts, with dense experts, and as it is.

All numbers are exact and follow from shapes:

* parameters: MPO experts share one central core, ``central + E * auxiliary`` per matrix; dense experts ``E * I * F``;
  dense ``I * F``; both mixtures add a router ``[I, E]``. Biases shared by experts count as the rest of the model.
* FLOPs: those of the contractions that `mpoe_kernels.plan_contraction` ranks first for MPO experts, ``2 N I F`` for the
  others (N = T * K rows; dense: T), three times that with the backward pass; a router ``2 T I E``.
* around hidden-side experts the projections are dense, and every expert owns a block per projection: `hidden_cost`;
  beside neurons the network is dense, and every expert owns rows of each projection: `neuron_cost`.

Tokens are those of one device in a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpoe.config import MPOEConfig
from mpoe.estimation.inventory import Inventory, Layer, Matrix
from mpoe_kernels import ContractionPlan, MPOShape, plan_contraction

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
    """Additive costs of a part of the model.

    Attributes:
        parameters: elements.
        flops: per step.
        temporary_bytes: peak of weights that a product rebuilds; for a sum, the larger.
    """

    parameters: int = 0
    flops: int = 0
    temporary_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        temporary = max(self.temporary_bytes, other.temporary_bytes)
        return Cost(self.parameters + other.parameters, self.flops + other.flops, temporary)

    def times(self, count: int) -> Cost:
        """``count`` such parts, one after the other."""
        return Cost(self.parameters * count, self.flops * count, self.temporary_bytes)

    def values(self, usage: Usage, dense: Cost | None = None) -> dict[str, Any]:
        """For JSON: with the bytes of weights and of the training's state, and FLOPs relative to those of ``dense``."""
        return {
            **vars(self),
            "weight_bytes": self.parameters * usage.dtype.itemsize,
            "state_bytes": self.parameters * STATE_BYTES if usage.training else 0,
            "x_dense": self.flops / dense.flops if dense is not None and dense.flops else None,
        }


@dataclass(frozen=True)
class MatrixCosts:
    """One projection: its shape (``None``: neurons stand beside it), how it is contracted (``None``: as it is, with the
    experts on its hidden side or beside it), its costs."""

    matrix: Matrix
    shape: MPOShape | None
    plan: ContractionPlan | None
    costs: Mapping[str, Cost]

    @property
    def lossless(self) -> bool:
        """Whether no bond is truncated."""
        return self.shape is None or self.shape.is_full

    @property
    def strategy(self) -> str:
        """How a forward pass contracts it."""
        if self.plan is not None:
            return self.plan.strategy
        return "neurons" if self.shape is None else "hidden"

    def values(self, usage: Usage) -> dict[str, Any]:
        """For JSON."""
        return {
            "kind": self.matrix.kind,
            "in_features": self.matrix.rows,
            "out_features": self.matrix.columns,
            "shape": None if self.shape is None else self.shape.to_dict(),
            "lossless": self.lossless,
            "strategy": self.strategy,
            "backward_strategy": None if self.plan is None else self.plan.backward_strategy,
            **{design: self.costs[design].values(usage, self.costs["dense"]) for design in DESIGNS},
        }


@dataclass(frozen=True)
class LayerCosts:
    """Equal layers.

    Attributes:
        names: names of the modules; their number is the count.
        streams: their streams.
        tokens: per step.
        matrices: projections of one layer.
        router: of one layer, for both mixtures.
    """

    names: tuple[str, ...]
    streams: tuple[str, ...]
    tokens: int
    matrices: tuple[MatrixCosts, ...]
    router: Cost

    def cost(self, design: str) -> Cost:
        """Costs of one layer."""
        own = sum((matrix.costs[design] for matrix in self.matrices), Cost())
        return own if design == "dense" else own + self.router

    def values(self, usage: Usage) -> dict[str, Any]:
        """For JSON: the costs of one of these layers."""
        return {
            "names": list(self.names),
            "count": len(self.names),
            "streams": list(self.streams),
            "tokens": self.tokens,
            "matrices": [matrix.values(usage) for matrix in self.matrices],
            "router": self.router.values(usage),
            **{design: self.cost(design).values(usage, self.cost("dense")) for design in DESIGNS},
        }


@dataclass(frozen=True)
class ModelCosts:
    """A whole model under one `MPOEConfig` and `Usage`.

    Attributes:
        layers: groups of equal layers.
        rest: everything that is the same in all designs: parameters; FLOPs of its matrix maps.
    """

    inventory: Inventory
    config: MPOEConfig
    usage: Usage
    layers: tuple[LayerCosts, ...]
    rest: Cost

    def experts(self, design: str) -> Cost:
        """Costs of all feed-forward layers."""
        return sum((layer.cost(design).times(len(layer.names)) for layer in self.layers), Cost())

    def whole(self, design: str) -> Cost:
        return self.experts(design) + self.rest

    @property
    def lossless(self) -> bool:
        """Whether no bond is truncated, so that a converted model starts exactly like the dense one."""
        return all(matrix.lossless for layer in self.layers for matrix in layer.matrices)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        usage, experts, whole = self.usage, self.experts, self.whole
        totals = {
            "feed_forward": {design: experts(design).values(usage, experts("dense")) for design in DESIGNS},
            "rest": self.rest.values(usage),
            "whole": {design: whole(design).values(usage, whole("dense")) for design in DESIGNS},
        }
        layers = [layer.values(usage) for layer in self.layers]
        return {"config": self.config.to_dict(), "layers": layers, "totals": totals}


def matrix_costs(
    matrix: Matrix, shape: MPOShape | None, config: MPOEConfig, usage: Usage, tokens: int, has_bias: bool = False
) -> MatrixCosts:
    """Costs of one projection on ``tokens`` tokens; ``has_bias``: of the network's first projection."""
    experts, slots = config.num_experts, tokens * config.top_k
    dense = Cost(matrix.elements, 2 * tokens * matrix.elements * usage.passes)
    switch = Cost(experts * matrix.elements, 2 * slots * matrix.elements * usage.passes)
    plan = None
    if config.is_hidden:
        mpoe = dense + hidden_cost(matrix, config, usage, slots)
    elif shape is None:
        mpoe = dense + neuron_cost(matrix, config, usage, tokens, has_bias or config.expert_bias)
    else:
        masked = usage.mask_central
        plan = plan_contraction(
            shape, experts, tokens, usage.dtype, top_k=config.top_k, training=usage.training, mask_central=masked
        )
        mpoe = Cost(shape.parameters(experts), plan.flops, plan.temporary_bytes)
    return MatrixCosts(matrix, shape, plan, {"mpoe": mpoe, "switch": switch, "dense": dense})


def hidden_cost(matrix: Matrix, config: MPOEConfig, usage: Usage, slots: int) -> Cost:
    """Blocks ``[b, b]`` of the experts on the hidden side of one projection, with every group of hidden units a row.

    With the backward pass, which recomputes the input of the activation, blocks after up and gate_proj take part in
    four products, those before down in three.
    """
    hidden = matrix.rows if matrix.kind == "down" else matrix.columns
    block = config.hidden_block(hidden)
    weights = config.num_experts * (hidden // block if config.block_per_group else 1)
    products = (3 if matrix.kind == "down" else 4) if usage.training else 1
    return Cost(weights * block * block, 2 * slots * hidden * block * products)


def neuron_cost(matrix: Matrix, config: MPOEConfig, usage: Usage, tokens: int, has_bias: bool) -> Cost:
    """Rows of one projection that the experts own, of the model's size or the latent one, and with a latent space one
    of the two matrices that they share.

    With the backward pass, which recomputes the input of the activation, rows of up and gate_proj take part in four
    products, those of down in three.
    """
    size = matrix.columns if matrix.kind == "down" else matrix.rows
    latent, neurons = config.latent, config.num_experts * (config.neurons or 0)
    row = size if latent is None else latent
    products = (3 if matrix.kind == "down" else 4) if usage.training else 1
    biases = neurons if has_bias and matrix.kind == "up" else 0
    own = Cost(neurons * row + biases, 2 * tokens * config.top_k * (config.neurons or 0) * row * products)
    if latent is None or matrix.kind == "gate_proj":
        return own
    return own + Cost(size * latent, 2 * tokens * size * latent * usage.passes)


def _layer_costs(alike: Sequence[Layer], config: MPOEConfig, usage: Usage, tokens: int) -> LayerCosts:
    first = alike[0]
    matrices = tuple(
        matrix_costs(
            m,
            None if config.is_neurons else config.shape_for(m.kind, m.rows, m.columns),
            config,
            usage,
            tokens,
            first.has_bias,
        )
        for m in first.matrices
    )
    router = first.model_size * config.num_experts
    streams = tuple(dict.fromkeys(layer.stream for layer in alike))
    names = tuple(layer.name for layer in alike)
    return LayerCosts(names, streams, tokens, matrices, Cost(router, 2 * tokens * router * usage.passes))


def model_costs(inventory: Inventory, config: MPOEConfig, usage: Usage) -> ModelCosts:
    """Costs of a model's layers, with equal layers grouped.

    Raises:
        ValueError: a shape that does not match a layer, tokens missing for a stream.
    """
    missing = [stream for stream in inventory.streams if stream not in usage.tokens]
    if missing:
        raise ValueError(f"tokens must be given for {', '.join(inventory.streams)}; missing: {', '.join(missing)}")
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in inventory.layers:
        groups.setdefault((layer.matrices, layer.has_bias, usage.tokens[layer.stream]), []).append(layer)
    layers = tuple(_layer_costs(alike, config, usage, usage.tokens[alike[0].stream]) for alike in groups.values())
    maps = sum(count * 2 * usage.tokens[s] * rows * columns for (s, rows, columns), count in inventory.rest.items())
    rest = Cost(inventory.parameters - inventory.ffn_elements, maps * usage.passes)
    return ModelCosts(inventory, config, usage, layers, rest)
