"""Learning rates: of every core, to match its scale; those that worked (the table used by
`mpoe train` and docs/fine_tuning.md); and a short search for one.

Why every core has its own: in the symmetric gauge the central core's RMS is .16-.28 of the weight's
and the auxiliary cores' 1.2-5.2. Adam changes every number by about its rate, so with a single rate
the central core changes 4-6 times too fast relative to its size, and separable shapes collapse. The
rate used here is

    rate(core) = (mpo_lr or learning_rate) x RMS(core) / RMS(weight) x (central_lr_scale |
    auxiliary_lr_scale)

with the ratios measured when the model was converted (`MPOCores.rate_ratios`). LR schedulers
multiply every group's `lr` by the same factor, so the proportions hold through warm-up and
decay.
"""

from __future__ import annotations

import copy
import gc
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PrinterCallback

from mpoe.config.shapes import NEURONS
from mpoe.layers.cores import MPOCores
from mpoe.layers.experts import DenseExperts
from mpoe.models.report import kept_modules, mpo_modules
from mpoe.models.table import TYPE_PREFIX
from mpoe.training.arguments import MPOETrainingArguments
from mpoe.training.callbacks import DivergenceError

# Order of the groups; the first one's rate is what the Trainer logs as `learning_rate`.
KINDS = ("rest", "router", "dense_expert", "central", "auxiliary")


def build_param_groups(model: nn.Module, args: MPOETrainingArguments) -> list[dict[str, Any]]:
    """Parameter groups for a torch optimizer, over all parameters that require a gradient.

    Each group is `{"params", "lr", "weight_decay", "kind"}`; parameters of equal kind, rate and
    decay share a group. Biases, norms and other vectors are not decayed.

    Raises:
        ValueError: nothing in the model requires a gradient.
    """
    cores = _core_rates(model, args)
    modules = list(model.modules())
    dense_experts = {
        id(p) for module in modules if isinstance(module, DenseExperts) for p in module.parameters()
    }
    norms = [module for module in modules if "norm" in type(module).__name__.lower()]
    undecayed = {id(p) for norm in norms for p in norm.parameters(recurse=False)}
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = "rest", args.learning_rate
        if id(parameter) in cores:
            kind, rate = cores[id(parameter)]
        elif "router" in name.split("."):
            kind, rate = "router", args.learning_rate * args.router_lr_scale
        elif id(parameter) in dense_experts and parameter.ndim == 3:
            kind, rate = "dense_expert", args.learning_rate * args.dense_expert_lr_scale
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
        names = type(optimizer).__name__, type(before).__name__
        raise ValueError(
            f"previous_optimizer must be of the kind that trains now, {names[0]}; got {names[1]}"
        )
    kept = [p for group in optimizer.param_groups for p in group["params"] if p in before.state]
    if not kept:
        raise ValueError(
            "previous_optimizer must have the state of parameters of this model: it must have made "
            "steps, and the model"
            " must be converted with inplace=True; got one that has none"
        )
    for parameter in kept:
        optimizer.state[parameter] = before.state[parameter]


def _core_rates(model: nn.Module, args: MPOETrainingArguments) -> dict[int, tuple[str, float]]:
    """id(core parameter) -> (kind, rate)."""
    central_scale, auxiliary_scale = args.lr_scales
    rates: dict[int, tuple[str, float]] = {}
    for name, cores in mpo_modules(model):
        for index, (parameter, ratio) in enumerate(
            zip(cores.chain(), _ratios(name, cores), strict=True)
        ):
            kind, scale = (
                ("central", central_scale)
                if index == cores.shape.central
                else ("auxiliary", auxiliary_scale)
            )
            rates[id(parameter)] = (
                kind,
                args.core_lr * (ratio if args.scale_core_lr else 1.0) * scale,
            )
    for layer in kept_modules(model).values():
        # Blocks start as identities, regardless of the scale of the weights around them. Neurons
        # have the scale of a dense network's and took its rate in our trials; a scale is then only
        # what was asked for.
        own_scale, shared_scale = auxiliary_scale, args.central_lr_scale
        if layer.shape == NEURONS:
            own_scale = 1.0 if args.auxiliary_lr_scale is None else args.auxiliary_lr_scale
        for parameter in layer.experts.own_cores:
            rates[id(parameter)] = ("auxiliary", args.core_lr * own_scale)
        for parameter in layer.shared_parameters().values():
            rates[id(parameter)] = (
                "central",
                args.core_lr * (1.0 if shared_scale is None else shared_scale),
            )
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


SCRATCH = "scratch"  # `MPOETrainingArguments.regime`
_DENSE, _SWITCH = (
    "dense",
    "switch",
)  # kinds of feed-forward layers; every other kind is a shape's name


class Tried(NamedTuple):
    """Base rates (AdamW) that worked for one family.

    Attributes:
        width: hidden size of the model on which they were found.
        rate: rate for every kind of layer that is not in ``other``.
        other: kind of layer (``dense``, ``switch`` = dense experts, or a shape) -> its rate.
        where: what was run.
    """

    width: int
    rate: float
    other: Mapping[str, float]
    where: str


EXPERT = "expert"  # kind: one expert of neurons beside a frozen decoder (`mpoe train --expert`)
TRIED = {
    "t5": Tried(
        128,
        1e-3,
        {"separable": 1.5e-3, "hidden": 1.5e-3},
        "`mpoe demo --compare`: three rates, two seeds",
    ),
    "gpt2": Tried(
        128, 3e-3, {}, "the stand-in on three texts, 100 and 300 steps: the best of five rates"
    ),
    "bert": Tried(
        384,
        3e-4,
        {},
        "MiniLM on short sentences, .00025 to .0005 in every arm ([Evidence](evidence.md))",
    ),
    EXPERT: Tried(
        576,
        0.01,
        {},
        "SmolLM2-135M-Instruct alone: a Llama; no weights of other families were at hand",
    ),
    SCRATCH: Tried(
        48, 0.016, {_SWITCH: 0.008}, "language modelling, two layers ([Evidence](evidence.md))"
    ),
}
_SAME = {"mt5": "t5", "umt5": "t5", "roberta": "bert", "deberta-v2": "bert", "modernbert": "bert"}
_EXPERTS_OF = "llama"  # the family whose experts were tried
_ELSE = "bert"  # for families without a known rate: the lowest at equal width


def is_known(model_type: str, regime: str, kind: str) -> bool:
    """Whether a rate was tried with this family; arguments as those of `recommended_rate`."""
    family = model_type.removeprefix(TYPE_PREFIX)
    if kind == EXPERT:
        return family == _EXPERTS_OF
    return regime == SCRATCH or _SAME.get(family, family) in TRIED


def recommended_rate(model_type: str, width: int, regime: str, kind: str) -> tuple[float, str]:
    """The base learning rate to start from, with AdamW, when the whole model is trained, and its
    reason in words.

    It is the rate that worked for the family and the kind of layer. For wider models it falls as 1
    / width, like Adam's best rate (Yang et al., Tensor Programs V, arXiv 2203.03466, Table 3).

    Args:
        model_type: Hugging Face's name of the family, optionally prefixed with ``mpoe_``.
        width: hidden size of the model.
        regime: ``"finetune"`` or ``"scratch"``.
        kind: ``"dense"``, ``"switch"`` (dense experts), ``"expert"`` (alone beside a frozen model)
            or the name of a shape.
    """
    family = model_type.removeprefix(TYPE_PREFIX)
    known = is_known(model_type, regime, kind)
    if kind == EXPERT:
        nearest = EXPERT
    elif regime == SCRATCH:
        nearest = SCRATCH
    else:
        nearest = _SAME.get(family, family) if known else _ELSE
    tried = TRIED[nearest]
    rate = tried.other.get(kind, tried.rate) * min(1.0, tried.width / width)
    about = f"{family} from scratch" if regime == SCRATCH else f"a pretrained {family}"
    words = {_DENSE: "dense layers", _SWITCH: "dense experts", EXPERT: "one expert beside it"}
    layers = words.get(kind, f"{kind} experts")
    why = f"{about}, {layers}, width {width}"
    if not known:
        why += f"; none is known of {family}, so that of {_EXPERTS_OF if kind == EXPERT else _ELSE}"
    return float(f"{rate:.2g}"), why


def kind_of(config: Any) -> str:
    """The kind of feed-forward layers of an `MPOEConfig`, in the terms of `Tried`; None means
    dense."""
    if config is None or "ffn" not in config.targets:
        return _DENSE
    if config.expert_type == "dense":
        return _SWITCH
    return config.shape if isinstance(config.shape, str) else "own"


# ---------------------------------------------- a short search: small runs, judged on items that
# none sees


STEPS, HELD_OUT = 30, 128
_FACTOR, _MOST = 3.0, 5  # between neighbouring rates; rates that are tried at most
# arguments of a trial: nothing is logged, saved or reported, and the rate falls to 0 over its steps
_TRIAL: dict[str, Any] = {
    **{f"{kind}_strategy": "no" for kind in ("logging", "eval", "save")},
    **dict.fromkeys(
        ("load_best_model_at_end", "push_to_hub", "predict_with_generate", "eval_on_start"), False
    ),
    "log_base_loss": False,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "report_to": [],
    "disable_tqdm": True,
}


def find_rate(
    trainer: Any, items: Sequence[Any], start: float, steps: int = STEPS
) -> tuple[float, dict[float, float]]:
    """The base rate, of three to five around ``start``, with the least loss on held-out items.

    Every trial is a short run of a copy of the model, with the trainer's arguments and its seed.
    The model and torch's random numbers are as before afterwards, bit for bit.

    Args:
        trainer: an `MPOETrainer` that has not begun.
        items: encoded training items; a tenth of them, at most `HELD_OUT`, judges.
        start: the rate in the middle.
        steps: of each trial.

    Returns:
        The rate, and the loss per target of each that was tried.

    Raises:
        ValueError: several processes, or fewer than two items.
    """
    args = trainer.args
    if args.world_size > 1:
        raise ValueError(
            f"find_rate needs one process; got {args.world_size} (search in one, then give "
            "learning_rate)"
        )
    if len(items) < 2:
        raise ValueError(f"find_rate needs two training items at least; got {len(items)}")
    order = list(range(len(items)))
    random.Random(f"find-rate-{args.seed}").shuffle(order)
    held = max(1, min(HELD_OUT, len(items) // 10))
    judged, rest = [items[k] for k in order[:held]], [items[k] for k in order[held:]]

    def tried(rate: float) -> float:
        trial_args = copy.copy(args)
        with tempfile.TemporaryDirectory() as folder:
            for name, value in {
                **_TRIAL,
                "output_dir": folder,
                "learning_rate": rate,
                "max_steps": steps,
            }.items():
                setattr(trial_args, name, value)
            model, how = copy.deepcopy(trainer.model), {"data_collator": trainer.data_collator}
            trial = type(trainer)(model=model, args=trial_args, train_dataset=rest, **how)
            trial.remove_callback(PrinterCallback)
            try:
                trial.train()
                loss = trial.evaluate(judged)["eval_loss"]
            except DivergenceError:
                return math.inf
            finally:  # a trainer, its optimizer and its scheduler refer to each other
                del trial, model
                gc.collect()
        return loss if math.isfinite(loss) else math.inf

    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        losses = _search(tried, start)
    return min(losses, key=lambda rate: (losses[rate], rate)), losses


def _search(tried: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate -> loss: three rates, and further ones while the best is at an end."""
    losses = {
        rate: tried(rate) for rate in (_rounded(start / _FACTOR), start, _rounded(start * _FACTOR))
    }
    while len(losses) < _MOST:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best not in (min(losses), max(losses)):
            break
        further = _rounded(best / _FACTOR if best == min(losses) else best * _FACTOR)
        losses[further] = tried(further)
    return dict(sorted(losses.items()))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
