"""`compose`: several fine-tunes of one model become the experts of one mixture.

Feed-forward networks become experts, one per fine-tune; all other parameters are the mean over the fine-tunes
(Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv 2403.07816). Routers need no training: see `mpoe.models.domains`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import check_choice, check_integer, check_type
from mpoe.models.base import MPOEModelMixin
from mpoe.models.convert import convert_to_mpoe, converted_class
from mpoe.models.domains import check_statistics, router_weight, statistics_of_expert, train_routers
from mpoe.models.find import dense_networks
from mpoe.models.report import routed_layers

ROUTERS = ("ridge", "train")
Batches = Sequence[Iterable[Mapping[str, Tensor]]]


def _check(base: Any, fine_tunes: Sequence[Any], examples: Batches | None, router: str, steps: int) -> None:
    """Refuse models that differ in more than values, and other arguments of `compose` that do not fit (ValueError)."""
    shapes = {name: p.shape for name, p in base.named_parameters()}
    for place, model in enumerate(fine_tunes):
        if type(model) is not type(base):
            raise ValueError(
                f"fine_tunes must be of the class of base, {type(base).__name__}; number {place} is a "
                f"{type(model).__name__}"
            )
        own = {name: p.shape for name, p in model.named_parameters()}
        odd = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
        if odd:
            raise ValueError(
                f"fine_tunes must have the parameters of base; number {place} differs in {odd[0]}: "
                f"{own.get(odd[0])} for {shapes.get(odd[0])}"
            )
    check_choice("router", router, ROUTERS)
    check_integer("steps", steps, 1)
    if examples is not None and len(examples) != len(fine_tunes):
        raise ValueError(f"examples must hold batches for each of {len(fine_tunes)} fine-tunes; got {len(examples)}")


def _mean_model(base: Any, fine_tunes: Sequence[Any]) -> Any:
    """The mean of the fine-tunes; parameters that are equal in all stay bit-identical."""
    mean = copy.deepcopy(base)
    others = [dict(model.named_parameters()) for model in fine_tunes]
    for name, parameter in mean.named_parameters():
        values = [other[name] for other in others]
        if all(torch.equal(values[0], value) for value in values[1:]):
            parameter.copy_(values[0])
        else:
            parameter.copy_(torch.stack([value.double() for value in values]).mean(0))
    return mean


def _outside(mixture: Any, base: Any, model: Any) -> float:
    """How far the parameters outside the experts are from a fine-tune's, relative to what it changed."""
    kept, start = dict(mixture.named_parameters()), dict(base.named_parameters())
    own = {name: p for name, p in model.named_parameters() if name in kept and kept[name].shape == p.shape}
    missed, changed, size = (
        float(sum(t.double().square().sum() for t in part)) ** 0.5
        for part in ([p - kept[n] for n, p in own.items()], [p - start[n] for n, p in own.items()], own.values())
    )
    return missed / (changed or size or 1.0)


def _finish(
    mixture: Any, base: Any, fine_tunes: Sequence[Any], examples: Batches | None, router: str, steps: int
) -> Any:
    """Set the last experts to the networks of the fine-tunes, and the routers by examples of these."""
    first = mixture.mpoe_config.num_experts - len(fine_tunes)
    for number, model in enumerate(fine_tunes, first):
        for site in dense_networks(model, mixture.mpoe_config):
            for kind, weights in mixture.get_submodule(site.name).experts.projections().items():
                weights.weight[number] = site.weight(kind)
                bias = site.bias(kind)
                if bias is not None:
                    weights.bias[number] = bias
    mixture.composition_report = {n: _outside(mixture, base, model) for n, model in enumerate(fine_tunes, first)}
    if examples is None:
        return mixture
    known, layers = getattr(mixture, "router_statistics", {}), routed_layers(mixture)
    classes = [
        {name.partition(".")[2]: value for name, value in known.items() if name.startswith(f"{number}.")}
        for number in range(first)
    ]
    for own in classes:
        check_statistics(own, {name: layer.in_features for name, layer in layers}, "router_statistics")
    classes += [statistics_of_expert(mixture, number, batches) for number, batches in enumerate(examples, first)]
    mixture.router_statistics = {f"{n}.{name}": value for n, own in enumerate(classes) for name, value in own.items()}
    for name, layer in layers:
        layer.router.weight.copy_(router_weight(classes, name, sharpness=1 / len(classes)))  # type: ignore[union-attr]
    if router == "train":
        train_routers(mixture, examples, first, steps)
    return mixture


@torch.no_grad()
def compose(
    base: Any,
    fine_tunes: Sequence[Any],
    examples: Batches | None = None,
    routing: RouterConfig | None = None,
    *,
    router: str = "ridge",
    steps: int = 200,
) -> Any:
    """Combine several fine-tunes of one model into a mixture with one expert each.

    Args:
        base: the dense model that they started from, of a family in `mpoe.models.table`. It is not changed.
        fine_tunes: dense models of the class of ``base``; those trained with LoRA after ``merge_and_unload``.
        examples: for every fine-tune, batches of its domain as keyword arguments of the model (``input_ids``,
            ``attention_mask``, ``labels``); a few hundred texts each are enough. ``None`` leaves the routers
            random: set them later, or train the mixture.
        routing: experts per token, capacity and so on; default: one expert per token.
        router: ``"ridge"``: closed form, see `mpoe.models.domains.router_weight`; ``"train"``: additionally trained,
            with everything else frozen.
        steps: optimizer steps of ``"train"``.

    Returns:
        The mixture, in eval mode; its experts are exact. ``composition_report`` says by number of the fine-tune how far
        the parameters outside the experts, which are the mean, are from its own: ``|W_mixture - W_fine_tune| /
        |W_fine_tune - W_base|`` (0 = exact; if nothing was changed, relative to the weights). ``router_statistics``
        holds what `add_expert` needs from these examples.

    Raises:
        TypeError: ``routing`` of another type.
        ValueError: no fine-tunes, models that differ in more than values, a number of examples other than one per
            fine-tune, examples without tokens, a mixture as ``base``.
    """
    if not fine_tunes:
        raise ValueError("fine_tunes must hold at least one model; got none")
    converted_class(base)
    _check(base, fine_tunes, examples, router, steps)
    config = MPOEConfig(num_experts=len(fine_tunes), expert_type="dense", router=routing or RouterConfig(top_k=1))
    sites = dense_networks(base, config)
    biases: Any = {  # of every expert its own
        "expert_bias": any(site.bias("up") is not None for site in sites),
        "expert_output_bias": any(site.bias("down") is not None for site in sites),
    }
    mean = _mean_model(base, fine_tunes)
    mixture = convert_to_mpoe(mean, dataclasses.replace(config, **biases), inplace=True).eval()
    return _finish(mixture, base, fine_tunes, examples, router, steps)


@torch.no_grad()
def add_expert(
    mixture: Any,
    base: Any,
    fine_tune: Any,
    examples: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    router: str = "ridge",
    steps: int = 200,
) -> Any:
    """Add one expert to a mixture; the other experts and all shared parameters stay bit-identical.

    With ``examples`` of the new domain and the mixture's ``router_statistics`` the routers are solved again as if all
    domains had been present from the start; the examples of earlier domains are not needed.

    Args:
        mixture: made by `compose`; it is not changed.
        base, fine_tune, router, steps: as in `compose`.
        examples: batches of the new domain; ``None``: the new expert gets a random row in every router.

    Raises:
        TypeError: a mixture that is not an MPOE model.
        ValueError: a model of another class or size, experts that are not dense, ``examples`` for a mixture without
            statistics.
    """
    check_type("mixture", mixture, MPOEModelMixin, "an MPOE model (see compose)")
    if converted_class(base) is not type(mixture):
        raise ValueError(f"base must be of the class that mixture was; got {type(base).__name__}")
    own = None if examples is None else [examples]
    _check(base, [fine_tune], own, router, steps)
    old = mixture.mpoe_config.num_experts
    config = dataclasses.replace(mixture.mpoe_config, num_experts=old + 1)
    if config.expert_type != "dense" or config.moe_type == "none":
        raise ValueError(f"mixture must have a router and dense experts (see compose); got {mixture.mpoe_config}")
    statistics = getattr(mixture, "router_statistics", None)
    if examples is not None and statistics is None:
        raise ValueError("mixture must carry router_statistics for examples to be used; it has none (see compose)")
    grown = convert_to_mpoe(base, config).eval()
    source = mixture.state_dict()
    for name, value in grown.state_dict().items():
        if value.shape == source[name].shape:
            value.copy_(source[name])
        else:
            value[:old] = source[name]
    grown.router_statistics = statistics or {}
    return _finish(grown, base, [fine_tune], own, router, steps)
