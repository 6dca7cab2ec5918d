"""Learning rates that worked: the table used by `mpoe train`, the Trainer's warnings and docs/fine_tuning.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mpoe.models.table import TYPE_PREFIX

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
    return [
        f"{name} {rate:g} is {_times(rate / usual)} the {usual:g} to start from ({found.why})"
        "; see docs/fine_tuning.md, Rates"
        for name, rate in rates.items()
        if rate > 0 and not 1 / FAR <= rate / usual * (1 + 1e-9) <= FAR * (1 + 2e-9)
    ]


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio > 1 else f"1/{1 / ratio:,.0f} of"
