"""`RouterConfig`: how tokens are routed to experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpoe.config import checks

SCORING_FUNCS = ("softmax", "sigmoid")
SECOND_POLICIES = ("all", "none", "threshold", "random")
# GShard's gating with the original's numbers: the defaults of `moe_type="moe"`.
GSHARD = {
    "top_k": 2,
    "second_policy": "random",
    "eval_second_policy": "all",
    "capacity_factor": 1.25,
    "eval_capacity_factor": 2.0,
    "min_capacity": 4,
}
ONE_EXPERT = {"top_k": 1}  # defaults of a saved router that leaves these out


@checks.refuse_unknown_fields
@dataclass
class RouterConfig:
    """How tokens are routed to experts. `RouterConfig()` is a Switch router,
    `RouterConfig.gshard()` GShard's.

    Attributes:
        top_k: experts per token; ``None`` = 2 for the shape ``"hidden"``, one in eight experts, two
            to eight, for ``"neurons"``, 1 for others, which is what we have evidence for; an
            `MPOEConfig` sets the number, at most the number of experts, and keeps it. A router
            without an `MPOEConfig` uses 1.
        is_scale_prob: multiply an expert's output by the raw probability p. By default top-1
            multiplies by p / stop_grad(p) (value 1, gradient log p's) and top-k renormalises its
            weights to sum 1.
        capacity_factor: training capacity of an expert, ``ceil(factor * T * K / E)`` slots;
            ``None`` = dropless.
        eval_capacity_factor: the same in eval mode.
        min_capacity: minimum number of slots of an expert if there is a capacity.
        second_policy: second choices that GShard's gating keeps in training: ``"all"``, ``"none"``,
            ``"threshold"`` or ``"random"``; ``None`` = no such gating, every token goes to its
            ``top_k`` experts. GShard's gating (Lepikhin et al. 2021, algorithm 1) needs ``top_k``
            2. ``"threshold"`` keeps second choices whose share of the two gates exceeds
            ``second_threshold``, ``"random"`` keeps them with probability share /
            ``second_threshold``, at most 1. A token's gates are renormalised over the choices that
            are kept, capacity is ``ceil(factor * T / E)``, and the balancing loss counts first
            choices.
        eval_second_policy: the same in eval mode, where a random policy would make results
            irreproducible.
        second_threshold: share of the two gates that ``"threshold"`` and ``"random"`` compare with.
        jitter: in training the router's input is multiplied by uniform noise in ``[1 - jitter, 1 +
            jitter]`` (Switch Transformers, section 2.4).
        balance_loss_weight: weight of every layer's load-balancing loss (Switch Transformers, eq.
            4-6).
        z_loss_weight: weight of every layer's router z-loss (ST-MoE, eq. 5).
        expert_dropout: dropout rate between an expert's projections (Switch's "expert dropout", the
            original's ``switch_dropout``); ``None`` = the rate of the dense model's FFN. With the
            shape ``"neurons"`` it is the rate on the experts' sum, ``None`` = 0, and the dense
            network keeps its own.
        scoring_func: what turns logits into the scores that choose experts and become gates:
            ``"softmax"``, or ``"sigmoid"`` (DeepSeek-V3, arXiv 2412.19437, eq. 13-16).
        routed_scaling_factor: the gates are multiplied by it, of the shape ``"neurons"`` alone;
            ``None`` = ``top_k`` there, or 1 with ``is_scale_prob``.
        bias_update_rate: above 0 the router has a bias of the scores, ``e_score_correction_bias``,
            which takes part in the choice of experts but not in their gates: `MPOETrainer` raises
            it by this rate after every step for experts with less than the mean load and lowers it
            for others (balance without a loss, arXiv 2408.15664, algorithm 1; .001 there, with
            sigmoid scores). The balancing loss keeps its own weight.
        request_weight: share of a mean in the logits of a token, that of the router's logits over
            the token's request so far, itself included; 0 = every token by itself. For the shape
            ``"neurons"`` in causal models.
        init_scale: router weights start from a truncated normal of variance ``init_scale /
            in_features``.
    """

    top_k: int | None = None
    is_scale_prob: bool = False
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 1
    second_policy: str | None = None
    eval_second_policy: str | None = None
    second_threshold: float = 0.2
    jitter: float = 0.0
    balance_loss_weight: float = 1e-2
    z_loss_weight: float = 0.0
    expert_dropout: float | None = None
    init_scale: float = 0.1
    scoring_func: str = "softmax"
    routed_scaling_factor: float | None = None
    bias_update_rate: float = 0.0
    request_weight: float = 0.0

    def __post_init__(self) -> None:
        checks.check_counts_and_flags(self)
        checks.check_choice("scoring_func", self.scoring_func, SCORING_FUNCS)
        for name in (
            "balance_loss_weight",
            "z_loss_weight",
            "init_scale",
            "bias_update_rate",
            "jitter",
        ):
            checks.check_number(name, getattr(self, name), 0.0)
        checks.check_number("request_weight", self.request_weight, 0.0, 1.0)
        for name in ("capacity_factor", "eval_capacity_factor", "routed_scaling_factor"):
            if getattr(self, name) is not None:
                checks.check_number(name, getattr(self, name), 0.0, open_low=True)
        if self.expert_dropout is not None:
            checks.check_number("expert_dropout", self.expert_dropout, 0.0)
        for name in ("jitter", "expert_dropout"):
            value = getattr(self, name)
            if value is not None and value >= 1:
                raise ValueError(f"{name} must be below 1; got {value}")
        self._check_second_policy()

    def _check_second_policy(self) -> None:
        checks.check_number("second_threshold", self.second_threshold, 0.0, 1.0, open_low=True)
        if self.second_policy is None:
            if self.eval_second_policy is not None:
                raise ValueError("eval_second_policy needs second_policy; got None for it")
            return
        if self.eval_second_policy is None:
            is_random = self.second_policy == "random"
            self.eval_second_policy = "all" if is_random else self.second_policy
        for name in ("second_policy", "eval_second_policy"):
            checks.check_choice(name, getattr(self, name), SECOND_POLICIES)
        if self.top_k != 2:
            raise ValueError(f"second_policy needs top_k 2; got {self.top_k}")
        if self.scoring_func != "softmax" or self.bias_update_rate:
            raise ValueError(
                "second_policy needs scoring_func 'softmax' and bias_update_rate 0; got "
                f"{self.scoring_func!r} and {self.bias_update_rate}"
            )

    @classmethod
    def gshard(cls, **values: Any) -> RouterConfig:
        """Top-2 gating with the original's numbers: random second choices, capacity 1.25 in
        training and 2 in evaluation, at least 4 slots; ``values`` replace any of them."""
        return cls.from_dict({**GSHARD, **values})

    @property
    def is_gshard(self) -> bool:
        return self.second_policy is not None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RouterConfig:
        """Inverse of `to_dict`; unknown fields are refused with the closest known ones."""
        checks.check_fields(cls, values, "RouterConfig")
        return cls(**values)
