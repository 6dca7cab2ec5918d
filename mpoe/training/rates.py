"""Learning rates that worked (the table used by `mpoe train` and docs/fine_tuning.md), and a short
search for one."""

import copy
import gc
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback

from mpoe.models.table import TYPE_PREFIX
from mpoe.training.callbacks import DivergenceError

SCRATCH = "scratch"  # `MPOETrainingArguments.regime`
# kinds of feed-forward layers; every other kind is a shape's name
_DENSE = "dense"
_SWITCH = "switch"


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
    nearest = _SAME.get(family, family) if known else _ELSE
    if kind == EXPERT or regime == SCRATCH:
        nearest = EXPERT if kind == EXPERT else SCRATCH
    tried = TRIED[nearest]
    rate = tried.other.get(kind, tried.rate) * min(1.0, tried.width / width)
    about = f"{family} from scratch" if regime == SCRATCH else f"a pretrained {family}"
    words = {_DENSE: "dense layers", _SWITCH: "dense experts", EXPERT: "one expert beside it"}
    why = f"{about}, {words.get(kind, f'{kind} experts')}, width {width}"
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


STEPS = 30
HELD_OUT = 128
_FACTOR, _MOST = 3.0, 5  # between neighbouring rates; rates that are tried at most
# arguments of a trial: nothing is logged, saved or reported, and the rate falls to 0 over its steps
_TRIAL: dict = {
    "logging_strategy": "no",
    "eval_strategy": "no",
    "save_strategy": "no",
    "load_best_model_at_end": False,
    "push_to_hub": False,
    "predict_with_generate": False,
    "eval_on_start": False,
    "log_base_loss": False,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": None,
    "warmup_steps": 0,
    "report_to": [],
    "disable_tqdm": True,
}


def find_rate(
    trainer: Any, items: Sequence, start: float, steps: int = STEPS
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
    judged = [items[k] for k in order[:held]]
    rest = [items[k] for k in order[held:]]

    def tried(rate: float) -> float:
        trial_args = copy.copy(args)
        with tempfile.TemporaryDirectory() as folder:
            changes = {"output_dir": folder, "learning_rate": rate, "max_steps": steps}
            vars(trial_args).update(_TRIAL | changes)
            trial = type(trainer)(
                model=copy.deepcopy(trainer.model),
                args=trial_args,
                train_dataset=rest,
                data_collator=trainer.data_collator,
            )
            trial.remove_callback(PrinterCallback)
            try:
                trial.train()
                loss = trial.evaluate(judged)["eval_loss"]
            except DivergenceError:
                return math.inf
            finally:  # a trainer, its optimizer and its scheduler refer to each other
                del trial
                gc.collect()
        return loss if math.isfinite(loss) else math.inf

    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        losses = _search(tried, start)
    return min(losses, key=lambda rate: (losses[rate], rate)), losses


def _search(tried: Callable[[float], float], start: float) -> dict[float, float]:
    """Rate -> loss: three rates, and further ones while the best is at an end."""
    first = (_rounded(start / _FACTOR), start, _rounded(start * _FACTOR))
    losses = {rate: tried(rate) for rate in first}
    while len(losses) < _MOST:
        best = min(losses, key=lambda rate: (losses[rate], rate))
        if best not in (min(losses), max(losses)):
            break
        further = _rounded(best / _FACTOR if best == min(losses) else best * _FACTOR)
        losses[further] = tried(further)
    return dict(sorted(losses.items()))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
