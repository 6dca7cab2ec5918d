"""Learning rates that worked: the table used by `mpoe train`, the Trainer's warnings and docs/fine_tuning.md; and a
short search for one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mpoe.models.table import TYPE_PREFIX
from mpoe.training.loss import count_targets, shifts_labels, split_loss
from mpoe.training.param_groups import build_param_groups

SCRATCH = "scratch"  # `MPOETrainingArguments.regime`
_DENSE, _SWITCH = "dense", "switch"  # kinds of feed-forward layers; every other kind is a shape's name


FAR = 10.0  # factor above or below a rate that worked


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


TRIED = {
    "t5": Tried(128, 1e-3, {"separable": 1.5e-3, "hidden": 1.5e-3}, "`mpoe demo --compare`: three rates, two seeds"),
    "gpt2": Tried(128, 3e-4, {}, "`mpoe demo --compare --model gpt2`: better in every arm than .001"),
    "bert": Tried(384, 3e-4, {}, "MiniLM on short sentences, .00025 to .0005 in every arm ([Evidence](evidence.md))"),
    SCRATCH: Tried(48, 0.016, {_SWITCH: 0.008}, "language modelling, two layers ([Evidence](evidence.md))"),
}
_SAME = {"mt5": "t5", "umt5": "t5", "roberta": "bert", "deberta-v2": "bert", "modernbert": "bert"}
_ELSE = "gpt2"  # for families without a known rate: the lower one


class Recommended(NamedTuple):
    """A base rate and the reason for it, in words."""

    rate: float
    why: str


def recommended_rate(model_type: str, width: int, regime: str, kind: str) -> Recommended:
    """The base learning rate to start from, with AdamW, when the whole model is trained.

    It is the rate that worked for the family and the kind of layer. For wider models it falls as 1 / width, like Adam's
    best rate (Yang et al., Tensor Programs V, arXiv 2203.03466, Table 3).

    Args:
        model_type: Hugging Face's name of the family, optionally prefixed with ``mpoe_``.
        width: hidden size of the model.
        regime: ``"finetune"`` or ``"scratch"``.
        kind: ``"dense"``, ``"switch"`` (dense experts) or the name of a shape.
    """
    family = model_type.removeprefix(TYPE_PREFIX)
    nearest = SCRATCH if regime == SCRATCH else _SAME.get(family, family)
    known = nearest in TRIED
    tried = TRIED[nearest if known else _ELSE]
    rate = tried.other.get(kind, tried.rate) * min(1.0, tried.width / width)
    about = f"{family} from scratch" if regime == SCRATCH else f"a pretrained {family}"
    layers = {_DENSE: "dense layers", _SWITCH: "dense experts"}.get(kind, f"{kind} experts")
    why = f"{about}, {layers}, width {width}"
    if not known:
        why += f"; none is known of {family}, so that of {_ELSE}"
    return Recommended(float(f"{rate:.2g}"), why)


def recommended_for(model: Any, regime: str) -> Recommended | None:
    """`recommended_rate` for a model in memory; None if it would only be a guess from another family's."""
    config = getattr(model, "config", None)
    family = str(getattr(config, "model_type", "")).removeprefix(TYPE_PREFIX)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int) or _SAME.get(family, family) not in TRIED:
        return None
    return recommended_rate(family, width, regime, kind_of(getattr(model, "mpoe_config", None)))


def kind_of(config: Any) -> str:
    """The kind of feed-forward layers of an `MPOEConfig`, in the terms of `Tried`; None means dense."""
    if config is None or "ffn" not in config.targets:
        return _DENSE
    if config.expert_type == "dense":
        return _SWITCH
    return config.shape if isinstance(config.shape, str) else "own"


def rate_advice(model: Any, args: Any) -> list[str]:
    """A sentence for every base rate that differs by more than a factor of `FAR` from what worked.

    Empty when training from scratch, where good rates vary more, and for families without a known rate.

    Args:
        model: that is trained.
        args: its `MPOETrainingArguments`.
    """
    found = recommended_for(model, args.regime)
    if found is None or args.regime != "finetune":
        return []
    usual = found.rate
    rates = {"learning_rate": args.learning_rate}
    if args.mpo_lr is not None:
        rates["mpo_lr"] = args.mpo_lr
    ratios = {name: (rate, rate / usual) for name, rate in rates.items() if rate > 0}
    return [
        f"{name} {rate:g} is {f'{ratio:,.0f} times' if ratio > 1 else f'1/{1 / ratio:,.0f} of'} the {usual:g} to start "
        f"from ({found.why}); see docs/fine_tuning.md, Rates"
        for name, (rate, ratio) in ratios.items()
        if not 1 / FAR <= ratio * (1 + 1e-9) <= FAR * (1 + 2e-9)
    ]


# ---------------------------------------------- a short search: small runs, judged on items that none sees


STEPS, HELD_OUT = 30, 128
_FACTOR, _MOST = 3.0, 5  # between neighbouring rates; rates that are tried at most


def find_rate(trainer: Any, items: Sequence[Any], start: float, steps: int = STEPS) -> tuple[float, dict[float, float]]:
    """The base rate, of three to five around ``start``, with the least loss on held-out items.

    Every trial is a run in miniature: AdamW, the trainer's parameter groups, batches and clipping, a rate that falls to
    0 over its steps, dropout from the same seed. The model, its gradients and the random numbers are as before
    afterwards, bit for bit.

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
    args, model = trainer.args, trainer.model
    if args.world_size > 1:
        raise ValueError(f"find_rate needs one process; got {args.world_size} (search in one, then give learning_rate)")
    if len(items) < 2:
        raise ValueError(f"find_rate needs two training items at least; got {len(items)}")
    order = list(range(len(items)))
    random.Random(f"find-rate-{args.seed}").shuffle(order)
    held = max(1, min(HELD_OUT, len(items) // 10))
    judged, rest = [items[k] for k in order[:held]], [items[k] for k in order[held:]]
    size = args.per_device_train_batch_size
    batches = [[rest[(step * size + k) % len(rest)] for k in range(size)] for step in range(steps)]
    kept = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    was_training, own_rate = model.training, args.learning_rate

    def tried(rate: float) -> float:
        torch.manual_seed(args.seed)
        args.learning_rate = rate
        _train(trainer, batches)
        loss = _loss(trainer, judged)
        for tensor, value in kept:
            tensor.detach().copy_(value)
            tensor.grad = None
        return loss

    devices = [args.device] if args.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            losses = _search(tried, start)
    finally:
        args.learning_rate = own_rate
        model.train(was_training)
    return min(losses, key=lambda rate: (losses[rate], rate)), losses


def _search(tried: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate -> loss: three rates, and further ones while the best is at an end."""
    losses = {rate: tried(rate) for rate in (_rounded(start / _FACTOR), start, _rounded(start * _FACTOR))}
    while len(losses) < _MOST:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best not in (min(losses), max(losses)):
            break
        further = _rounded(best / _FACTOR if best == min(losses) else best * _FACTOR)
        losses[further] = tried(further)
    return dict(sorted(losses.items()))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")


def _train(trainer: Any, batches: Sequence[Sequence[Any]]) -> None:
    args, model = trainer.args, trainer.model
    model.train()
    optimizer = torch.optim.AdamW(
        build_param_groups(model, args), betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon
    )
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    for batch in batches:
        with trainer.compute_loss_context_manager():
            loss = split_loss(model(**trainer._prepare_inputs(trainer.data_collator(batch)))).total
        if not torch.isfinite(loss):
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        falling.step()


@torch.no_grad()
def _loss(trainer: Any, items: Sequence[Any]) -> float:
    """Mean loss per target; infinite where it is no number."""
    model, size, total, count = trainer.model.eval(), trainer.args.per_device_eval_batch_size, 0.0, 0
    for start in range(0, len(items), size):
        batch = trainer._prepare_inputs(trainer.data_collator(items[start : start + size]))
        targets = int(count_targets(batch["labels"], shifts_labels(model)))
        with trainer.compute_loss_context_manager():
            total += float(split_loss(model(**batch)).task) * targets
        count += targets
    return total / max(count, 1) if math.isfinite(total) else math.inf
