"""`compose`: several fine-tunes of one model become the experts of one mixture.

Feed-forward networks become experts, one per fine-tune; all other parameters are the mean over the fine-tunes
(Branch-Train-MiX, Sukhbaatar et al. 2024, arXiv 2403.07816). Routers need no training: see `mpoe.models.domains`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import check_choice, check_integer
from mpoe.models.convert import convert_to_mpoe, converted_class
from mpoe.models.domains import router_weight, statistics_of_expert, train_routers
from mpoe.models.find import dense_networks
from mpoe.models.report import routed_layers

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
        |W_fine_tune - W_base|`` (0 = exact; if nothing was changed, relative to the weights).

    Raises:
        TypeError: ``routing`` of another type.
        ValueError: no fine-tunes, models that differ in more than values, a number of examples other than one per
            fine-tune, examples without tokens, a mixture as ``base``.
    """
    if not fine_tunes:
        raise ValueError("fine_tunes must hold at least one model; got none")
    converted_class(base)
    _check_alike(base, fine_tunes)
    check_choice("router", router, ROUTERS)
    check_integer("steps", steps, 1)
    if examples is not None and len(examples) != len(fine_tunes):
        raise ValueError(f"examples must hold batches for each of {len(fine_tunes)} fine-tunes; got {len(examples)}")
    config = MPOEConfig(num_experts=len(fine_tunes), expert_type="dense", router=routing or RouterConfig(top_k=1))
    sites = dense_networks(base, config)
    # Every expert has biases of its own.
    config.expert_bias = any(site.bias("up") is not None for site in sites)
    config.expert_output_bias = any(site.bias("down") is not None for site in sites)
    mixture = convert_to_mpoe(_mean_model(base, fine_tunes), config, inplace=True).eval()
    for number, model in enumerate(fine_tunes):
        for site in dense_networks(model, config):
            for kind, weights in mixture.get_submodule(site.name).experts.projections().items():
                weights.weight[number] = site.weight(kind)
                bias = site.bias(kind)
                if bias is not None:
                    weights.bias[number] = bias
    mixture.composition_report = {n: _outside(mixture, base, model) for n, model in enumerate(fine_tunes)}
    if examples is not None:
        classes = [statistics_of_expert(mixture, number, batches) for number, batches in enumerate(examples)]
        for name, layer in routed_layers(mixture):
            own: Any = layer.router
            own.weight.copy_(router_weight(classes, name, sharpness=1 / len(classes)))
    if examples is not None and router == "train":
        train_routers(mixture, examples, steps)
    return mixture
