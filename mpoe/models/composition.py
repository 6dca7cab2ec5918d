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
from mpoe.models.domains import collect, solve_routers, train_routers
from mpoe.models.find import dense_networks

ROUTERS = ("ridge", "train")
Batches = Sequence[Iterable[Mapping[str, Tensor]]]


def _check_alike(base: Any, fine_tunes: Sequence[Any]) -> None:
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


def _exact_config(base: Any, experts: int, routing: RouterConfig | None) -> MPOEConfig:
    """A configuration of dense experts with all biases of the networks of ``base``."""
    if routing is not None and not isinstance(routing, RouterConfig):
        raise TypeError(f"routing must be a RouterConfig; got {type(routing).__name__}")
    config = MPOEConfig(num_experts=experts, expert_type="dense", router=routing or RouterConfig(top_k=1))
    sites = dense_networks(base, config)
    return dataclasses.replace(
        config,
        expert_bias=any(site.bias("up") is not None for site in sites),
        expert_output_bias=any(site.bias("down") is not None for site in sites),
    )


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


def _outside(mixture: Any, base: Any, numbered: Mapping[int, Any]) -> dict[int, float]:
    """How far the parameters outside the experts are from every fine-tune's, relative to what it changed."""
    kept, start = dict(mixture.named_parameters()), dict(base.named_parameters())
    found = {}
    for number, model in numbered.items():
        own = {name: p for name, p in model.named_parameters() if name in kept and kept[name].shape == p.shape}
        missed, changed, size = (
            float(sum(t.double().square().sum() for t in part)) ** 0.5
            for part in ([p - kept[n] for n, p in own.items()], [p - start[n] for n, p in own.items()], own.values())
        )
        found[number] = missed / (changed or size or 1.0)
    return found


def _finish(
    mixture: Any, base: Any, numbered: Mapping[int, Any], examples: Batches | None, how: tuple[str, int, float]
) -> Any:
    """Set the experts of these numbers to the networks of their fine-tunes, and the routers by examples of these."""
    for number, model in numbered.items():
        for site in dense_networks(model, mixture.mpoe_config):
            for kind, weights in mixture.get_submodule(site.name).experts.projections().items():
                weights.weight[number] = site.weight(kind)
                bias = site.bias(kind)
                if bias is not None:
                    weights.bias[number] = bias
    mixture.composition_report = _outside(mixture, base, numbered)
    if examples is not None:
        first, (router, steps, ridge) = min(numbered), how
        mixture.router_statistics = collect(mixture, examples, first, getattr(mixture, "router_statistics", None))
        solve_routers(mixture, mixture.router_statistics, ridge)
        if router == "train":
            train_routers(mixture, examples, first, steps)
    return mixture


def _check_router(router: str, steps: int, ridge: float, examples: Batches | None, experts: int) -> None:
    check_choice("router", router, ROUTERS)
    check_integer("steps", steps, 1)
    if not ridge > 0:
        raise ValueError(f"ridge must be a positive number; got {ridge!r}")
    if examples is not None and len(examples) != experts:
        raise ValueError(f"examples must hold batches for each of {experts} fine-tunes; got {len(examples)}")


@torch.no_grad()
def compose(
    base: Any,
    fine_tunes: Sequence[Any],
    examples: Batches | None = None,
    routing: RouterConfig | None = None,
    *,
    router: str = "ridge",
    steps: int = 200,
    ridge: float = 1e-3,
) -> Any:
    """Combine several fine-tunes of one model into a mixture with one expert each.

    Args:
        base: the dense model that they started from, of a family in `mpoe.models.table`. It is not changed.
        fine_tunes: dense models of the class of ``base``; those trained with LoRA after ``merge_and_unload``.
        examples: for every fine-tune, batches of its domain as keyword arguments of the model (``input_ids``,
            ``attention_mask``, ``labels``); a few hundred texts each are enough. ``None`` leaves the routers
            random: set them later, or train the mixture.
        routing: experts per token, capacity and so on; default: one expert per token.
        router: ``"ridge"``: closed form, see `mpoe.models.domains.solve_routers`; ``"train"``: additionally trained,
            with everything else frozen.
        steps: optimizer steps of ``"train"``.
        ridge: penalty of the regression, relative to the mean square of a feature.

    Returns:
        The mixture, in eval mode; its experts are exact. ``composition_report`` says by number of the fine-tune how far
        the parameters outside the experts, which are the mean, are from its own: ``|W_mixture - W_fine_tune| /
        |W_fine_tune - W_base|`` (0 = exact; if nothing was changed, relative to the weights). ``router_statistics``
        holds what `add_expert` needs from these examples.

    Raises:
        TypeError: ``routing`` of another type.
        ValueError: no fine-tunes, models that differ in more than values, a number of examples other than one per
            fine-tune, a mixture as ``base``.
    """
    if not fine_tunes:
        raise ValueError("fine_tunes must hold at least one model; got none")
    converted_class(base)
    _check_alike(base, fine_tunes)
    config = _exact_config(base, len(fine_tunes), routing)
    _check_router(router, steps, ridge, examples, len(fine_tunes))
    mixture = convert_to_mpoe(_mean_model(base, fine_tunes), config, inplace=True).eval()
    return _finish(mixture, base, dict(enumerate(fine_tunes)), examples, (router, steps, ridge))


@torch.no_grad()
def add_expert(
    mixture: Any,
    base: Any,
    fine_tune: Any,
    examples: Iterable[Mapping[str, Tensor]] | None = None,
    *,
    router: str = "ridge",
    steps: int = 200,
    ridge: float = 1e-3,
) -> Any:
    """Add one expert to a mixture; the other experts and all shared parameters stay bit-identical.

    With ``examples`` of the new domain and the mixture's ``router_statistics`` the routers are solved again as if all
    domains had been present from the start; the examples of earlier domains are not needed.

    Args:
        mixture: made by `compose`; it is not changed.
        base, fine_tune, router, steps, ridge: as in `compose`.
        examples: batches of the new domain; ``None``: the new expert gets a random row in every router.

    Raises:
        TypeError: a mixture that is not an MPOE model.
        ValueError: a model of another class or size, experts that are not dense, ``examples`` for a mixture without
            statistics.
    """
    check_type("mixture", mixture, MPOEModelMixin, "an MPOE model (see compose)")
    if converted_class(base) is not type(mixture):
        raise ValueError(f"base must be of the class that mixture was; got {type(base).__name__}")
    _check_alike(base, [fine_tune])
    old = mixture.mpoe_config.num_experts
    config = dataclasses.replace(mixture.mpoe_config, num_experts=old + 1)
    if config.expert_type != "dense" or config.moe_type == "none":
        raise ValueError(f"mixture must have a router and dense experts (see compose); got {mixture.mpoe_config}")
    _check_router(router, steps, ridge, None if examples is None else [examples], 1)
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
    if examples is not None:
        grown.router_statistics = statistics
    own = None if examples is None else [examples]
    return _finish(grown, base, {old: fine_tune}, own, (router, steps, ridge))
