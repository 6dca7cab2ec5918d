"""Routers in closed form, from statistics of domains, optionally followed by training.

A domain's statistics are, for every layer, those of its router's input over the tokens of the domain, while all of them
go to the domain's own expert: the mean, and the covariance as a sketch, ``sum_i values_i vectors_i vectors_i' +
diag(rest)``: its largest eigenvalues, and what its diagonal has beyond them. As tensors by name, of a layer NAME:

- ``NAME.mean``, ``NAME.rest``: float32 ``[I]``,
- ``NAME.vectors``: float16 ``[r, I]``, of length 1,
- ``NAME.values``: float32 ``[r]``.

A router is a linear discriminant of the domains, the ridge regression of the domain on its input. That needs nothing
but these statistics, so domains can be added and removed later without the others' texts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpoe.config.checks import check_integer, check_type
from mpoe.data.predict import evaluation_mode
from mpoe.layers.router import TopKRouter
from mpoe.models.base import MPOEModelMixin
from mpoe.models.convert import check_finite
from mpoe.models.report import neuron_modules, routed_layers

Statistics = Mapping[str, Tensor]
PARTS = ("mean", "rest", "vectors", "values")
SHARE = 0.1  # of an expert's bytes is what its statistics may have
RANK = 512  # eigenvectors, at most, of statistics from texts at hand
RIDGE = 1e-3  # relative to the mean square of a number of the router's input
LEARNING_RATE = 1e-3


class Moments:
    """Sums over tokens of a router's inputs and of their outer products, float64.

    Attributes:
        outer: ``[I, I]``.
        sum: ``[I]``.
        tokens: their number.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.outer = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: Tensor) -> None:
        """``[T, I]``."""
        rows = rows.float()
        self.outer += (rows.mT @ rows).double()
        self.sum += rows.double().sum(0)
        self.tokens += len(rows)


def _router_like(own: TopKRouter, rows: Tensor, barred: Sequence[int], **changes: Any) -> TopKRouter:
    """A router with weights ``rows [E, I]`` that never chooses some experts, and these changes of its configuration."""
    config = dataclasses.replace(own.config, bias_update_rate=1.0, **changes)
    made = TopKRouter(own.in_features, own.num_experts, config, device=own.weight.device, dtype=own.weight.dtype)
    made.weight.data.copy_(rows)
    assert made.e_score_correction_bias is not None
    made.e_score_correction_bias[list(barred)] = -torch.inf
    return made


@contextlib.contextmanager
def _routed_by(mixture: nn.Module, made: Callable[[str, TopKRouter], TopKRouter]) -> Iterator[None]:
    """Other routers meanwhile, made of a layer's name and its own."""
    own: dict[str, Any] = {name: layer.router for name, layer in routed_layers(mixture)}
    try:
        for name, router in own.items():
            mixture.get_submodule(name).router = made(name, router).eval()
        yield
    finally:
        for name, router in own.items():
            mixture.get_submodule(name).router = router


def forced(mixture: nn.Module, expert: int) -> contextlib.AbstractContextManager[None]:
    """Every token goes to one expert of every layer, with gate 1, regardless of capacity."""
    limits = ("capacity_factor", "eval_capacity_factor", "second_policy", "eval_second_policy", "routed_scaling_factor")
    alone: dict[str, Any] = {**dict.fromkeys(limits), "top_k": 1, "is_scale_prob": False}

    def made(_: str, own: TopKRouter) -> TopKRouter:
        others = [number for number in range(own.num_experts) if number != expert]
        return _router_like(own, torch.zeros_like(own.weight), others, **alone)

    return _routed_by(mixture, made)


def without(mixture: nn.Module, expert: int, weights: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """No token goes to one expert; ``weights [E - 1, I]`` by layer are the routers of the others."""

    def made(name: str, own: TopKRouter) -> TopKRouter:
        rows = weights[name]
        every = torch.cat([rows[:expert], rows.new_zeros(1, own.in_features), rows[expert:]])
        return _router_like(own, every, [expert], top_k=min(own.top_k, len(rows)))

    return _routed_by(mixture, made)


def on_device_of(mixture: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch where the model's parameters are."""
    device = next(mixture.parameters()).device
    return {name: value.to(device) for name, value in batch.items()}


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


def _statistics(
    model: Any, layers: Mapping[str, Any], batches: Iterable[Mapping[str, Tensor]], rank: int | None
) -> dict[str, Tensor]:
    sums = {name: Moments(layer.in_features, next(layer.experts.parameters()).device) for name, layer in layers.items()}

    def hook(name: str) -> Any:
        """Adds the tokens that a layer's experts see; padding reads as zeros."""
        return lambda experts, given: sums[name].add(given[0][given[0].ne(0).any(-1)])

    with contextlib.ExitStack() as until_then:
        until_then.enter_context(evaluation_mode(model))
        for name, layer in layers.items():
            until_then.callback(layer.experts.register_forward_pre_hook(hook(name)).remove)
        for batch in batches:
            if not isinstance(batch, Mapping) or not all(isinstance(value, Tensor) for value in batch.values()):
                raise TypeError(f"batches must hold tensors by argument of the model; got {type(batch).__name__}")
            model(**on_device_of(model, batch))
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if not sums[name].tokens:
            raise ValueError(f"batches must hold tokens; {name} got none")
        if not bool(torch.isfinite(sums[name].outer).all()):
            raise ValueError(f"batches must give finite inputs to every router; those of {name} hold NaN or Inf")
        own, most = layer.in_features, rank
        if most is None:  # as many as fit into a tenth of the expert; a mean and a diagonal are always there
            left = SHARE * sum(part.nbytes for part in layer.experts.parameters()) - 8 * own
            most = max(0, int(left / (2 * own + 4)))
        sketch = _sketch(sums[name], min(own, most))
        found |= {f"{name}.{part}": value for part, value in sketch.items()}
    return found


@torch.no_grad()
def collect_statistics(
    model: Any, batches: Iterable[Mapping[str, Tensor]], rank: int | None = None
) -> dict[str, Tensor]:
    """The statistics of a domain for the routers of a later mixture, from one pass over texts of it.

    Args:
        model: with an expert, see `start_expert`; it is not changed.
        batches: keyword arguments of the model, some thousand tokens or more; what ``attention_mask`` leaves out is not
            counted.
        rank: eigenvectors of each layer's sketch, as many as there are at most; ``None`` = as many as make the
            statistics at most a tenth of the expert's bytes. Mean and diagonal alone are more than that with fewer than
            10 neurons (7 gated ones; in 16 bits 20 and 14).

    Returns:
        Tensors by name, see `mpoe.models.domains`.

    Raises:
        TypeError: ``model`` is not an MPOE model, a batch holds no tensors by name, a ``rank`` that is no integer.
        ValueError: a model without neurons, no tokens, a negative ``rank``, inputs that are not finite.
    """
    check_type("model", model, MPOEModelMixin, "a model with an expert (see start_expert)")
    layers = neuron_modules(model)
    if not layers:
        raise ValueError(f"model must have experts of the shape 'neurons' (see start_expert); {type(model).__name__}")
    check_finite(model)
    check_integer("rank", rank, 0, optional=True)
    return _statistics(model, layers, batches, rank)


@torch.no_grad()
def statistics_of_expert(mixture: Any, expert: int, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As `collect_statistics`, while every token goes to one expert of a mixture, with up to `RANK` eigenvectors."""
    with forced(mixture, expert):
        return _statistics(mixture, dict(routed_layers(mixture)), batches, RANK)


def check_statistics(statistics: Statistics, sizes: Mapping[str, int], whose: str) -> None:
    """Refuse statistics that are not those of layers of these sizes, by name (TypeError, ValueError)."""
    check_type(whose, statistics, Mapping, "a mapping (see collect_statistics)")
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


def router_weight(classes: Sequence[Statistics], layer: str, sharpness: float = 3.0) -> Tensor:
    """The router of ``layer`` for these classes, float64 ``[E, I]``: a linear discriminant without a constant.

    It is the ridge regression of the class on the input, all classes with equal weight, from their second moments:
    ``W = s E (S + r)^-1 (means - their mean)``. There is no constant term, because routers have none: targets are
    centred, since a softmax ignores a common offset. The regression's outputs are probabilities minus 1/E, so with
    ``sharpness`` s = 1/E the softmax agrees with them to first order.
    """
    means = torch.stack([statistics[f"{layer}.mean"].double() for statistics in classes])
    pooled = torch.stack([_second_moment(statistics, layer) for statistics in classes]).mean(0)
    pooled.diagonal().add_(RIDGE * pooled.diagonal().mean())
    return sharpness * len(classes) * torch.linalg.solve(pooled, (means - means.mean(0)).mT).mT


def train_routers(mixture: Any, examples: Sequence[Iterable[Mapping[str, Tensor]]], steps: int) -> list[float]:
    """Train only the routers (AdamW, 1e-3) on the cross-entropy of the domain at every router, plus the model's own
    loss if batches have labels. Everything else stays bit-identical.

    Returns:
        The loss of every step; a step uses one batch of each domain.
    """
    weights = [layer.router.weight for _, layer in routed_layers(mixture) if layer.router is not None]
    was = [(p, p.requires_grad) for p in mixture.parameters()]
    for p, _ in was:
        p.requires_grad_(any(p is weight for weight in weights))
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    domains = [itertools.cycle(list(batches)) for batches in examples]
    losses = []
    with torch.enable_grad():
        for _ in range(steps):
            parts = [_domain_loss(mixture, next(batches), number) for number, batches in enumerate(domains)]
            optimizer.zero_grad()
            total = torch.stack(parts).sum()
            total.backward()
            optimizer.step()
            losses.append(float(total.detach()))
    for p, needed in was:
        p.requires_grad_(needed)
    return losses


def _domain_loss(mixture: Any, batch: Mapping[str, Tensor], domain: int) -> Tensor:
    batch = on_device_of(mixture, batch)
    out = mixture(**batch, return_dict=True, output_router_logits=True)
    mask = batch.get("attention_mask")
    own = []
    for logits in out.router_logits:
        target = logits.new_full((len(logits),), domain, dtype=torch.int64)
        if mask is not None and mask.numel() == len(logits):
            target = target.masked_fill(~mask.reshape(-1).bool(), -100)
        own.append(F.cross_entropy(logits, target))
    loss: Tensor = torch.stack(own).mean()
    task = getattr(out, "task_loss", None)
    return loss if task is None else loss + task
