"""`compose`: several fine-tunes of one model become the experts of one mixture.

Feed-forward networks become experts, one per fine-tune; all other parameters are the mean over the fine-tunes
(Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv 2403.07816). Routers need no training: see `mpoe.models.domains`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.layers.cores import MPOCores
from mpoe.layers.dense import ExpertWeights
from mpoe.layers.feed_forward import MPOEFeedForward, RoutedFeedForward
from mpoe.layers.hidden import HiddenFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.convert import convert_to_mpoe, converted_class
from mpoe.models.domains import collect, solve_routers, train_routers
from mpoe.models.families import family_of
from mpoe.models.find import find_sites
from mpoe.models.sites import FFNSite

ROUTERS = ("ridge", "train")
Batches = Sequence[Iterable[Mapping[str, Tensor]]]
# L-BFGS steps to fit an MPO expert around an existing centre.
FIT_STEPS = 100


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


def exact_config(base: Any, experts: int) -> MPOEConfig:
    """A configuration of dense experts with all biases of the networks of ``base``."""
    config = MPOEConfig(num_experts=experts, expert_type="dense")
    sites = _ffn_sites(base, config).values()
    config.expert_bias = any(site.bias("up") is not None for site in sites)
    config.expert_output_bias = any(site.bias("down") is not None for site in sites)
    return config


def _checked_config(config: MPOEConfig | None, base: Any, experts: int) -> MPOEConfig:
    if config is None:
        config = exact_config(base, experts)
    if not isinstance(config, MPOEConfig):
        raise TypeError(f"config must be an MPOEConfig; got {type(config).__name__}")
    if config.moe_type == "none" or config.targets != ("ffn",):
        raise ValueError(
            "config must have a router and target_modules 'ffn' to compose; got "
            f"moe_type={config.moe_type!r}, target_modules={config.target_modules!r}"
        )
    if config.is_neurons:
        raise ValueError("config must have experts that can hold a fine-tune's network; shape 'neurons' cannot")
    return dataclasses.replace(config, num_experts=experts)


def _ffn_sites(model: Any, config: MPOEConfig) -> dict[str, FFNSite]:
    sites = find_sites(model, family_of(model.config.model_type), model.config, config)
    return {site.name: site for site in sites if isinstance(site, FFNSite)}


def _norm(tensors: Iterator[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


def _error(missed: float, changed: float, whole: float) -> float:
    """Error relative to the change, or relative to the ``whole`` weight if nothing was changed."""
    return missed / (changed or whole or 1.0)


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


# ------------------------------------------------------------------- experts


def _fit_cores(cores: MPOCores, expert: int, wanted: Tensor) -> None:
    """Fit one expert's auxiliary cores to a full weight ``[I, F]``, by L-BFGS on the squared error."""
    parameters = list(cores.auxiliary)
    was = [(p, p.requires_grad) for p in cores.parameters()]
    for p, _ in was:
        p.requires_grad_(any(p is each for each in parameters))
    scale = wanted.square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
    optimizer = torch.optim.LBFGS(parameters, max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (cores.dense_weights()[expert] - wanted).square().sum() / scale
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    optimizer.zero_grad()
    for p, needed in was:
        p.requires_grad_(needed)


def _fit_hidden(layer: HiddenFeedForward, expert: int, site: FFNSite) -> None:
    """Blocks of one expert by least squares: ``up R = W_up`` and ``L down = W_down``, group by group."""
    experts, projections = layer.experts, layer.projections()
    size = experts.block_size
    groups = layer.hidden_features // size
    for kind, name in (("up", "right"), ("gate_proj", "right_gate"), ("down", "left")):
        if kind not in projections:
            continue
        centre, goal = layer.central_weight(kind).double(), site.weight(kind).double()
        if kind == "down":  # rows are the hidden units
            a = centre.view(groups, size, -1).mT
            b = goal.view(groups, size, -1).mT
        else:
            a = centre.view(-1, groups, size).transpose(0, 1)
            b = goal.view(-1, groups, size).transpose(0, 1)
        if not experts.per_group:
            a, b = a.reshape(1, -1, size), b.reshape(1, -1, size)
        # Along directions that the centre lacks, the blocks stay identities.
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        block = eye + torch.linalg.pinv(a) @ (b - a)
        experts.auxiliary[name][expert] = (block.mT if kind == "down" else block).to(experts.dtype)
    if experts.bias is not None:
        kind = "gate_proj" if experts.is_gated else "up"
        own = site.bias(kind)
        if own is not None:
            core = experts.auxiliary["right_gate" if experts.is_gated else "right"][expert].double()
            centre = projections[kind].bias.double().view(groups, 1, size)  # type: ignore[operator]
            experts.bias[expert] = (own.double() - (centre @ core.expand(groups, -1, -1)).reshape(-1)).to(experts.dtype)


def _set_experts(layer: RoutedFeedForward, sites: Mapping[int, FFNSite], is_new: bool) -> None:
    """Set the experts of ``layer`` with these indices to the networks of their fine-tunes.

    ``is_new``: the layer has no other experts, so the shared parameters may be set too.
    """
    if isinstance(layer, HiddenFeedForward):
        for number, site in sites.items():
            _fit_hidden(layer, number, site)
        return
    assert isinstance(layer, MPOEFeedForward)
    for kind, projection in layer.experts.projections().items():
        if isinstance(projection, ExpertWeights):
            for number, site in sites.items():
                projection.weight[number] = site.weight(kind)
        elif is_new:
            projection.load_weights_(torch.stack([site.weight(kind) for site in sites.values()]))
        else:
            for number, site in sites.items():
                _fit_cores(projection, number, site.weight(kind))
        for number, site in sites.items():
            bias = site.bias(kind)
            if bias is not None and projection.bias is not None and projection.bias.dim() == 2:
                projection.bias[number] = bias


def _weights(layer: RoutedFeedForward, kind: str) -> Tensor:
    """Every expert's full weight."""
    if isinstance(layer, HiddenFeedForward):
        return layer.expert_weights(kind)
    assert isinstance(layer, MPOEFeedForward)
    weights: Tensor = layer.experts.projections()[kind].dense_weights()
    return weights


def _told(mixture: Any, base: Any, numbered: Mapping[int, Any], config: MPOEConfig) -> dict[str, Any]:
    """Relative errors of the experts and of the shared parameters, for each fine-tune."""
    start = _ffn_sites(base, config)
    report: dict[str, dict[str, dict[int, float]]] = {}
    of = {number: _ffn_sites(model, config) for number, model in numbered.items()}
    for name, site in start.items():
        layer: Any = mixture.get_submodule(name)
        report[name] = {}
        for kind in site.dense:
            weights, first = _weights(layer, kind).double(), site.weight(kind).double()
            wanted = {n: own[name].weight(kind).double() for n, own in of.items()}
            report[name][kind] = {
                n: _error(float((weights[n] - value).norm()), float((value - first).norm()), float(first.norm()))
                for n, value in wanted.items()
            }
    kept = dict(mixture.named_parameters())
    start_values = dict(base.named_parameters())
    outside = {}
    for number, model in numbered.items():
        own = {name: p for name, p in model.named_parameters() if name in kept and kept[name].shape == p.shape}
        missed = _norm(p - kept[name] for name, p in own.items())
        changed = _norm(p - start_values[name] for name, p in own.items())
        outside[number] = _error(missed, changed, _norm(iter(own.values())))
    return {"experts": report, "shared": outside}


def _route(mixture: Any, examples: Batches, first: int, router: str, steps: int, ridge: float) -> None:
    """Collect the statistics of the domains from ``first`` on, and set the routers."""
    statistics = getattr(mixture, "router_statistics", None)
    mixture.router_statistics = collect(mixture, examples, first, statistics)
    solve_routers(mixture, mixture.router_statistics, ridge)
    if router == "train":
        train_routers(mixture, examples, first, steps)


def _check_router(router: str, steps: int, ridge: float, examples: Batches | None, experts: int) -> None:
    if router not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(map(repr, ROUTERS))}; got {router!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1; got {steps!r}")
    if not ridge > 0:
        raise ValueError(f"ridge must be a positive number; got {ridge!r}")
    if examples is not None and len(examples) != experts:
        raise ValueError(f"examples must hold batches for each of {experts} fine-tunes; got {len(examples)}")


@torch.no_grad()
def compose(
    base: Any,
    fine_tunes: Sequence[Any],
    examples: Batches | None = None,
    config: MPOEConfig | None = None,
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
        config: how experts are built; default: dense experts with their own biases, which represent the feed-forward
            networks exactly. Hidden-side experts are fitted by least squares, MPO experts by alternating least squares
            (`mpoe_kernels.decompose_shared`). ``num_experts`` is always set to the number of fine-tunes.
        router: ``"ridge"``: closed form, see `mpoe.models.domains.solve_routers`; ``"train"``: additionally trained,
            with everything else frozen.
        steps: optimizer steps of ``"train"``.
        ridge: penalty of the regression, relative to the mean square of a feature.

    Returns:
        The mixture, in eval mode. Its ``composition_report`` has the error per layer, kind and expert, ``|W_mixture -
        W_fine_tune| / |W_fine_tune - W_base|`` (0 = exact; if nothing was changed, relative to the weight), and the
        same for the parameters outside the experts under ``"shared"``. ``router_statistics`` holds what `add_expert`
        needs from these examples.

    Raises:
        TypeError: ``config`` of another type.
        ValueError: no fine-tunes, models that differ in more than values, a number of examples other than one per
            fine-tune, a mixture as ``base``, a configuration without a router.
    """
    if not fine_tunes:
        raise ValueError("fine_tunes must hold at least one model; got none")
    converted_class(base)
    _check_alike(base, fine_tunes)
    config = _checked_config(config, base, len(fine_tunes))
    _check_router(router, steps, ridge, examples, len(fine_tunes))
    mixture = convert_to_mpoe(_mean_model(base, fine_tunes), config, inplace=True).eval()
    numbered = dict(enumerate(fine_tunes))
    _fill(mixture, numbered, config, is_new=True)
    mixture.composition_report = _told(mixture, base, numbered, config)
    if examples is not None:
        _route(mixture, examples, 0, router, steps, ridge)
    return mixture


def _fill(mixture: Any, numbered: Mapping[int, Any], config: MPOEConfig, is_new: bool) -> None:
    sites = {number: _ffn_sites(model, config) for number, model in numbered.items()}
    for name in next(iter(sites.values())):
        layer: Any = mixture.get_submodule(name)
        _set_experts(layer, {number: own[name] for number, own in sites.items()}, is_new)


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
        ValueError: a model of another class or size, ``examples`` for a mixture without statistics.
    """
    if not isinstance(mixture, MPOEModelMixin):
        raise TypeError(f"mixture must be an MPOE model (see compose); got {type(mixture).__name__}")
    if converted_class(base) is not type(mixture):
        raise ValueError(f"base must be of the class that mixture was; got {type(base).__name__}")
    _check_alike(base, [fine_tune])
    old = mixture.mpoe_config.num_experts
    config = _checked_config(mixture.mpoe_config, base, old + 1)
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
    _fill(grown, {old: fine_tune}, config, is_new=False)
    grown.composition_report = _told(grown, base, {old: fine_tune}, config)
    if examples is not None:
        grown.router_statistics = statistics
        _route(grown, [examples], old, router, steps, ridge)
    return grown
