"""The cost of every feed-forward layer with MPO experts, with dense experts (Switch) and as a dense layer.

All numbers follow from shapes:

* parameters: MPO experts share one central core, ``central + E * auxiliary`` per matrix; dense experts ``E * I * F``;
  dense ``I * F``; both mixtures add a router ``[I, E]``. Biases shared by experts count as the rest of the model.
* optimizer bytes: `OPTIMIZER_BYTES` per trained parameter.
* operations: the planner's count for MPO experts, ``2 N I F`` for the others (N = T * K rows; dense: T), three times
  that with the backward pass; a router ``2 T I E``.
* around hidden-side experts the projections are dense, and every expert owns a block per projection: `hidden_costs`.
* time: the planner's prediction for the device, from every product's arithmetic, memory traffic and calls. Both
* mixtures add their router in float32 and the copies for dispatch and combine.
* "x dense" divides by the dense layer's time on the same tokens.

Tokens are those of one device in a step; every expert is assumed to get an equal share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mpoe.config import MPOEConfig
from mpoe.estimation.inventory import Inventory, Layer, Matrix
from mpoe.estimation.timing import Device
from mpoe_kernels import ContractionPlan, MPOShape, plan_contraction
from mpoe_kernels.planner.contraction import expected_busy_experts

OPTIMIZER_BYTES = 8  # AdamW: two float32 moments per trained parameter
GRADIENT_BYTES = 4  # float32, like the parameters that mixed-precision training keeps
TRAINED_PARAMETER_BYTES = 4
DESIGNS = ("mpoe", "switch", "dense")


@dataclass(frozen=True)
class Usage:
    """The workload and the device.

    Attributes:
        tokens: per stream (``encoder``, ``decoder`` or ``main``), tokens of one device in one step.
        device: the device, and the dtype of activations and products.
        training: forward and backward, rather than forward.
        mask_central: the gradient mask is on: the central core gets no gradient in this step.
    """

    tokens: Mapping[str, int]
    device: Device
    training: bool
    mask_central: bool = False

    @property
    def passes(self) -> int:
        """Number of products of a dense linear in the step: the output and, in training, the two gradients."""
        return 3 if self.training else 1


@dataclass(frozen=True)
class Cost:
    """Additive costs of a part of the model.

    Attributes:
        parameters: elements.
        temporary_bytes: peak temporary weight memory; for a sum, the larger.
        flops: per step.
        seconds: predicted, per step.
    """

    parameters: int = 0
    temporary_bytes: int = 0
    flops: int = 0
    seconds: float = 0.0

    @property
    def optimizer_bytes(self) -> int:
        return OPTIMIZER_BYTES * self.parameters

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.parameters + other.parameters,
            max(self.temporary_bytes, other.temporary_bytes),
            self.flops + other.flops,
            self.seconds + other.seconds,
        )

    def times(self, count: int) -> Cost:
        """``count`` such parts, one after the other."""
        return Cost(self.parameters * count, self.temporary_bytes, self.flops * count, self.seconds * count)


def total(costs: Iterable[Cost]) -> Cost:
    """Sum; temporary bytes are the largest."""
    return sum(costs, Cost())


@dataclass(frozen=True)
class MatrixCosts:
    """One projection: its shape, the planner's choice, and the cost of every design.

    With hidden-side experts there is nothing to choose: ``plan`` is ``None``.
    """

    matrix: Matrix
    shape: MPOShape
    plan: ContractionPlan | None
    costs: Mapping[str, Cost]


@dataclass(frozen=True)
class LayerCosts:
    """Equal layers.

    Attributes:
        names: names of the modules; their number is the count.
        streams: their streams.
        tokens: per step.
        matrices: projections of one layer.
        routing: router, sorting and combining of one layer, for both mixtures.
    """

    names: tuple[str, ...]
    streams: tuple[str, ...]
    tokens: int
    matrices: tuple[MatrixCosts, ...]
    routing: Cost

    @property
    def count(self) -> int:
        return len(self.names)

    def cost(self, design: str) -> Cost:
        """Costs of one layer."""
        own = total(matrix.costs[design] for matrix in self.matrices)
        return own if design == "dense" else own + self.routing


@dataclass(frozen=True)
class ModelCosts:
    """A whole model under one `MPOEConfig` and `Usage`.

    Attributes:
        layers: groups of equal layers.
        rest: everything that is the same in all designs: parameters; operations and time of its matrix maps.
    """

    inventory: Inventory
    config: MPOEConfig
    workload: Usage
    layers: tuple[LayerCosts, ...]
    rest: Cost

    def experts(self, design: str) -> Cost:
        """Costs of all feed-forward layers."""
        return total(layer.cost(design).times(layer.count) for layer in self.layers)

    def whole(self, design: str) -> Cost:
        return self.experts(design) + self.rest

    def x_dense(self, design: str = "mpoe") -> float | None:
        """Time of the feed-forward layers relative to the dense ones; None without tokens."""
        dense = self.experts("dense").seconds
        return self.experts(design).seconds / dense if self.has_tokens else None

    @property
    def has_tokens(self) -> bool:
        return any(self.workload.tokens.values())

    def updated(self, design: str) -> int:
        """Parameters that get a gradient in the step: all except masked central cores."""
        parameters = self.whole(design).parameters
        if design != "mpoe" or not self.workload.mask_central:
            return parameters
        central = sum(m.shape.central_parameters * layer.count for layer in self.layers for m in layer.matrices)
        return parameters - central

    def optimizer_seconds(self, parameters: int) -> float:
        """AdamW in float32 reads parameter, gradient and two moments and writes all but the gradient: 28 bytes each."""
        return self.workload.device.copy_seconds(28 * parameters) if self.workload.training else 0.0


def matrix_costs(matrix: Matrix, shape: MPOShape, config: MPOEConfig, work: Usage, tokens: int) -> MatrixCosts:
    """Costs of one projection on ``tokens`` tokens."""
    experts, top_k = config.num_experts, config.top_k
    slots = tokens * top_k
    dense, switch = 2 * tokens * matrix.elements, 2 * slots * matrix.elements
    plan = None
    if config.is_hidden:
        own = hidden_costs(matrix, config, work, slots)
        centre = Cost(matrix.elements, 0, dense * work.passes, switch_seconds(matrix, 1, tokens, work))
        mpoe = own + centre
    else:
        plan = plan_contraction(
            shape,
            experts,
            tokens,
            work.device.dtype,
            work.device.name,
            top_k=top_k,
            training=work.training,
            mask_central=work.mask_central,
        )
        mpoe = Cost(shape.parameters(experts), plan.temporary_bytes, plan.flops, plan.seconds)
    costs = {
        "mpoe": mpoe,
        "switch": Cost(
            experts * matrix.elements, 0, switch * work.passes, switch_seconds(matrix, experts, slots, work)
        ),
        "dense": Cost(matrix.elements, 0, dense * work.passes, switch_seconds(matrix, 1, tokens, work)),
    }
    return MatrixCosts(matrix, shape, plan, costs)


def hidden_costs(matrix: Matrix, config: MPOEConfig, work: Usage, slots: int) -> Cost:
    """Blocks ``[b, b]`` of the experts on the hidden side of one projection, with every group of hidden units a row.

    With the backward pass, which recomputes the input of the activation, blocks after up and gate_proj take part in
    four products, those before down in three.
    """
    hidden = matrix.rows if matrix.kind == "down" else matrix.columns
    block = config.hidden_block(hidden)
    groups = hidden // block
    weights = config.num_experts * (groups if config.block_per_group else 1)
    products = (3 if matrix.kind == "down" else 4) if work.training else 1
    seconds = work.device.linear_seconds(slots * groups, block, block, weights, work.training, one_call=True)
    if products == 4:
        seconds += work.device.linear_seconds(slots * groups, block, block, weights, False, one_call=True)
    if work.training and slots:  # gradients of idle experts are zeros, which are written too
        idle = weights - expected_busy_experts(weights, slots * groups)
        seconds += work.device.copy_seconds(idle * block * block * work.device.element_size)
    return Cost(weights * block * block, 0, 2 * slots * hidden * block * products, seconds)


def switch_seconds(matrix: Matrix, experts: int, slots: int, work: Usage) -> float:
    """Products of ``slots`` rows with ``experts`` dense weights (one: a dense linear)."""
    return work.device.linear_seconds(slots, matrix.rows, matrix.columns, experts, work.training)


def routing_cost(model_size: int, experts: int, top_k: int, tokens: int, work: Usage, sorts: bool = True) -> Cost:
    """Router in float32; dispatch and combine, which read and write every row, and again in the backward pass.

    ``sorts``: whether rows are copied; with hidden-side experts they are not.
    """
    moved = 0 if not sorts else 4 * tokens * top_k * model_size * work.device.element_size * (2 if work.training else 1)
    router = work.device.in_float32().linear_seconds(tokens, model_size, experts, 1, work.training)
    return Cost(
        model_size * experts,
        0,
        2 * tokens * model_size * experts * work.passes,
        router + work.device.copy_seconds(moved),
    )


def _layer_costs(names: list[Layer], config: MPOEConfig, work: Usage, tokens: int) -> LayerCosts:
    first = names[0]
    matrices = tuple(
        matrix_costs(m, config.shape_for(m.kind, m.rows, m.columns), config, work, tokens) for m in first.matrices
    )
    routing = routing_cost(first.model_size, config.num_experts, config.top_k, tokens, work, not config.is_hidden)
    streams = tuple(dict.fromkeys(layer.stream for layer in names))
    return LayerCosts(tuple(layer.name for layer in names), streams, tokens, matrices, routing)


def _rest_cost(inventory: Inventory, work: Usage) -> Cost:
    flops, seconds = 0, 0.0
    for (stream, rows, columns), count in inventory.rest.items():
        tokens = work.tokens[stream]
        flops += count * 2 * tokens * rows * columns * work.passes
        seconds += count * work.device.linear_seconds(tokens, rows, columns, 1, work.training)
    return Cost(inventory.parameters - inventory.ffn_elements, 0, flops, seconds)


def model_costs(inventory: Inventory, config: MPOEConfig, work: Usage) -> ModelCosts:
    """Costs of a model's layers, with equal layers grouped.

    Raises:
        ValueError: a shape that does not match a layer, tokens missing for a stream.
    """
    missing = [stream for stream in inventory.streams if stream not in work.tokens]
    if missing:
        raise ValueError(f"tokens must be given for {', '.join(inventory.streams)}; missing: {', '.join(missing)}")
    groups: dict[tuple[object, ...], list[Layer]] = {}
    for layer in inventory.layers:
        groups.setdefault((layer.matrices, work.tokens[layer.stream]), []).append(layer)
    layers = tuple(_layer_costs(alike, config, work, work.tokens[alike[0].stream]) for alike in groups.values())
    return ModelCosts(inventory, config, work, layers, _rest_cost(inventory, work))
