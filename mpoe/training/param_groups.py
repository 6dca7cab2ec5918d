"""Parameter groups for optimizers: every core has a learning rate of its own, to match its scale.

In the symmetric gauge the central core's RMS is .16-.28 of the weight's and the auxiliary cores'
1.2-5.2. Adam changes every number by about its rate, so with a single rate the central core changes
4-6 times too fast relative to its size, and separable shapes collapse. The rate used here is

    rate(core) = (mpo_lr or learning_rate) x RMS(core) / RMS(weight) x (central_lr_scale |
    auxiliary_lr_scale)

with the ratios measured when the model was converted (`MPOCores.rate_ratios`). LR schedulers
multiply every group's `lr` by the same factor, so the proportions hold through warm-up and
decay.
"""

import math
import warnings
from typing import Any

import torch
from torch import nn

from mpoe.config.shapes import NEURONS
from mpoe.layers.cores import ExpertWeights, MPOCores
from mpoe.models.walk import kept_modules, mpo_modules
from mpoe.training.arguments import MPOETrainingArguments

# Order of the groups; the first one's rate is what the Trainer logs as `learning_rate`.
KINDS = ("rest", "router", "dense_expert", "central", "auxiliary")


def build_param_groups(model: nn.Module, args: MPOETrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, over all parameters that require a gradient.

    Each group is `{"params", "lr", "weight_decay", "kind"}`; parameters of equal kind, rate and
    decay share a group. Biases, norms and other vectors are not decayed.

    Raises:
        ValueError: nothing in the model requires a gradient.
    """
    rates = _core_rates(model, args)
    undecayed: set[int] = set()
    for module in model.modules():
        if isinstance(module, ExpertWeights):
            dense_rate = args.learning_rate * args.dense_expert_lr_scale
            rates[id(module.weight)] = ("dense_expert", dense_rate)
        if "norm" in type(module).__name__.lower():
            undecayed |= set(map(id, module.parameters(recurse=False)))
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = rates.get(id(parameter), ("rest", args.learning_rate))
        if kind == "rest" and "router" in name.split("."):
            kind = "router"
            rate = args.learning_rate * args.router_lr_scale
        decayed = parameter.ndim > 1 and "bias" not in name and id(parameter) not in undecayed
        decay = args.weight_decay if decayed else 0.0
        new = {"params": [], "lr": rate, "weight_decay": decay, "kind": kind}
        groups.setdefault((kind, rate, decay), new)["params"].append(parameter)
    if not groups:
        raise ValueError(
            f"no parameter of {type(model).__name__} requires a gradient: nothing to train"
        )
    return sorted(
        groups.values(),
        key=lambda group: (KINDS.index(group["kind"]), -group["weight_decay"], -group["lr"]),
    )


def keep_state(previous: torch.optim.Optimizer, optimizer: torch.optim.Optimizer) -> None:
    """Let a new optimizer go on with the state of the parameters that both have.

    Raises:
        ValueError: the previous one is of another kind, or has the state of none of them.
    """
    before = getattr(previous, "optimizer", previous)  # Accelerate's wrapper has it
    if type(before) is not type(optimizer):
        raise ValueError(
            "previous_optimizer must be of the kind that trains now, "
            f"{type(optimizer).__name__}; got {type(before).__name__}"
        )
    kept = [p for group in optimizer.param_groups for p in group["params"] if p in before.state]
    if not kept:
        raise ValueError(
            "previous_optimizer must have the state of parameters of this model: it must have made "
            "steps, and the model must be converted with inplace=True; got one that has none"
        )
    for parameter in kept:
        optimizer.state[parameter] = before.state[parameter]


def _core_rates(model: nn.Module, args: MPOETrainingArguments) -> dict[int, tuple[str, float]]:
    """id(core parameter) -> (kind, rate)."""
    central_scale, auxiliary_scale = args.lr_scales
    rates: dict[int, tuple[str, float]] = {}
    for name, cores in mpo_modules(model):
        for parameter, ratio in zip(cores.chain(), _ratios(name, cores), strict=True):
            rate = args.core_lr * (ratio if args.scale_core_lr else 1.0)
            if parameter is cores.central:
                rates[id(parameter)] = ("central", rate * central_scale)
            else:
                rates[id(parameter)] = ("auxiliary", rate * auxiliary_scale)
    for layer in kept_modules(model).values():
        # Blocks start as identities, regardless of the scale of the weights around them. Neurons
        # have the scale of a dense network's and took its rate in our trials; a scale is then only
        # what was asked for.
        own_scale = auxiliary_scale
        shared_scale = 1.0 if args.central_lr_scale is None else args.central_lr_scale
        if layer.shape == NEURONS:
            own_scale = 1.0 if args.auxiliary_lr_scale is None else args.auxiliary_lr_scale
        for parameter in layer.experts.own_cores:
            rates[id(parameter)] = ("auxiliary", args.core_lr * own_scale)
        for parameter in layer.shared_parameters().values():
            rates[id(parameter)] = ("central", args.core_lr * shared_scale)
    return rates


def _ratios(name: str, cores: MPOCores) -> list[float]:
    ratios = cores.rate_ratios
    usable = [ratio if math.isfinite(ratio) and ratio > 0 else 1.0 for ratio in ratios]
    if usable != list(ratios):  # an all-zero weight has no scale to compare with
        warnings.warn(
            f"{name} has unusable rate ratios {ratios}: those cores train at the unscaled rate",
            stacklevel=2,
        )
    return usable
