"""Routers of experts that were trained apart, in closed form from statistics that each expert's file holds.

An expert's statistics are, for every layer, those of its router's input over the tokens of its domain: the mean, and
their covariance as a sketch, ``sum_i values_i vectors_i vectors_i' + diag(rest)``: its largest eigenvalues, and what
its diagonal has beyond them. As tensors by name, of a layer NAME:

- ``NAME.mean``, ``NAME.rest``: float32 ``[I]``,
- ``NAME.vectors``: float16 ``[r, I]``, of length 1,
- ``NAME.values``: float32 ``[r]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.layers.neurons import NeuronFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.convert import check_finite
from mpoe.models.domains import Moments, discriminant
from mpoe.models.kept import neuron_modules

Statistics = Mapping[str, Tensor]
PARTS = ("mean", "rest", "vectors", "values")
# A tenth of an expert's bytes is what its statistics may have.
SHARE = 0.1
RIDGE = 1e-3  # relative to the mean square of a number of the router's input
SHARPNESS = 3.0  # of the gates: factor on logits whose softmax is the regression's probability, to first order


def _sketch(moments: Moments, rank: int) -> dict[str, Tensor]:
    mean = moments.sum / moments.tokens
    covariance = moments.outer / moments.tokens - torch.outer(mean, mean)
    values, vectors = torch.linalg.eigh(covariance)  # ascending
    first = len(mean) - rank
    values, vectors = values[first:].clamp_min(0).float(), vectors[:, first:].mT.half()
    told = (values[:, None].double() * vectors.double().square()).sum(0)
    rest = (covariance.diagonal() - told).clamp_min(0)
    parts = (mean.float(), rest.float(), vectors, values)
    return {name: part.contiguous().cpu() for name, part in zip(PARTS, parts, strict=True)}


def _rank(layer: NeuronFeedForward) -> int:
    """As many eigenvectors as fit into a tenth of the expert; a mean and a diagonal are always there."""
    size = layer.in_features
    left = SHARE * sum(part.nbytes for part in layer.experts.parameters()) - 8 * size
    return max(0, min(size, int(left / (2 * size + 4))))


@torch.no_grad()
def collect_statistics(
    model: Any, batches: Iterable[Mapping[str, Tensor]], rank: int | None = None
) -> dict[str, Tensor]:
    """The statistics of a domain for the routers of a later mixture, from one pass over texts of it.

    Args:
        model: with an expert, see `start_expert`; it is not changed.
        batches: keyword arguments of the model, some thousand tokens or more; what ``attention_mask`` leaves out is not
            counted.
        rank: eigenvectors of each layer's sketch; ``None`` = as many as make the statistics at most a tenth of the
            expert's bytes. Mean and diagonal alone are more than that with fewer than 10 neurons (7 gated ones; in 16
            bits 20 and 14).

    Returns:
        Tensors by name, see `mpoe.models.expert_router`.

    Raises:
        TypeError: ``model`` is not an MPOE model, a batch holds no tensors by name.
        ValueError: a model without neurons, no tokens, a ``rank`` that is no integer between 0 and the model size,
            inputs that are not finite.
    """
    if not isinstance(model, MPOEModelMixin):
        raise TypeError(f"model must have an expert (see start_expert); got {type(model).__name__}")
    layers = neuron_modules(model)
    if not layers:
        raise ValueError(f"model must have experts of the shape 'neurons' (see start_expert); {type(model).__name__}")
    check_finite(model)
    size = min(layer.in_features for layer in layers.values())
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank <= size):
        raise ValueError(f"rank must be an integer from 0 to the model size {size}, or None; got {rank!r}")
    module: Any = model
    sums = {name: Moments(layer.in_features, layer.experts.up.device) for name, layer in layers.items()}

    def hook(name: str) -> Any:
        """Adds the tokens that a layer's experts see, padding excluded."""
        return lambda experts, given: sums[name].add(given[0][given[2][:, 0] >= 0])

    handles = [layer.experts.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    was_training, device = module.training, next(module.parameters()).device
    try:
        module.eval()
        for batch in batches:
            if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
                raise TypeError(f"batches must hold tensors by argument of the model; got {type(batch).__name__}")
            module(**{name: value.to(device) for name, value in batch.items()})
    finally:
        module.train(was_training)
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if not sums[name].tokens:
            raise ValueError(f"batches must hold tokens; {name} got none")
        if not bool(torch.isfinite(sums[name].outer).all()):
            raise ValueError(f"batches must give finite inputs to every router; those of {name} hold NaN or Inf")
        sketch = _sketch(sums[name], _rank(layer) if rank is None else rank)
        found |= {f"{name}.{part}": value for part, value in sketch.items()}
    return found


def check_statistics(statistics: Statistics, sizes: Mapping[str, int], whose: str) -> None:
    """Refuse statistics that are not those of layers of these sizes, by name (TypeError, ValueError)."""
    if not isinstance(statistics, Mapping):
        raise TypeError(f"{whose} must be a mapping (see collect_statistics); got {type(statistics).__name__}")
    wanted = {f"{layer}.{part}" for layer in sizes for part in PARTS}
    if wanted != set(statistics):
        odd = sorted(map(str, wanted.symmetric_difference(statistics)))[0]
        raise ValueError(f"{whose} must hold mean, rest, vectors and values of every layer and nothing else; see {odd}")
    for layer, size in sizes.items():
        rank = len(statistics[f"{layer}.vectors"])
        shapes = {"mean": (size,), "rest": (size,), "vectors": (rank, size), "values": (rank,)}
        for part, shape in shapes.items():
            value = statistics[f"{layer}.{part}"]
            if tuple(value.shape) != shape or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{whose} must hold finite numbers {list(shape)} as {layer}.{part}; they are others")


def _second_moment(statistics: Statistics, layer: str) -> Tensor:
    mean, rest, vectors, values = (statistics[f"{layer}.{part}"].double() for part in PARTS)
    return torch.outer(mean, mean) + torch.diag(rest) + vectors.mT @ (values[:, None] * vectors)


def router_weight(classes: Sequence[Statistics], layer: str) -> Tensor:
    """The router of ``layer`` for these classes, float64 ``[E, I]``: a linear discriminant without a constant.

    It is the ridge regression of the class on the input, all classes with equal weight, from their second moments:
    ``W = 3 E (S + r)^-1 (means - their mean)``. See `mpoe.models.domains.solve_routers` for why there is no constant.
    """
    means = torch.stack([statistics[f"{layer}.mean"].double() for statistics in classes])
    pooled = torch.stack([_second_moment(statistics, layer) for statistics in classes]).mean(0)
    return len(classes) * SHARPNESS * discriminant(means, pooled, RIDGE)
