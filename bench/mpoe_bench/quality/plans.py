"""What is run: which arms, on which field, with which budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mpoe_bench.quality.arms import ARMS
from mpoe_bench.quality.hidden import (
    ADAPTER_COMPARISONS,
    BEST_COMPARISONS,
    BEST_PLAN,
    COMPARISONS,
    GROUP,
    HIDDEN,
    LARGER_COMPARISONS,
    LARGER_PLAN,
    MASK_COMPARISONS,
    SHARED,
    SPANS_COMPARISONS,
)
from mpoe_bench.quality.hidden_search import SEARCH
from mpoe_bench.quality.language import DOMAINS
from mpoe_bench.quality.search import TRIALS


@dataclass(frozen=True)
class Plan:
    """A set of runs.

    Attributes:
        field: ``"sentences"``, ``"language"``, ``"spans"`` or ``"novels"``.
        arms: keys of arms, in order.
        steps: steps of every run.
        seeds: every arm runs with every seed.
        tuning: steps of the runs that choose an arm's rate among ``rates`` on the validation split; 0 = no tuning, all
            arms use the first of ``rates``.
        rates: base learning rates.
        tuning_seed: seed of those runs; not among ``seeds``.
        settings: attributes of the field that differ from its defaults.
        validate_only: runs are judged on the validation split and do not read the test split.
        comparisons: pairs of arms whose difference is tested, stated in plan.json before any run.
    """

    field: str
    arms: tuple[str, ...]
    steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: int = 0
    rates: tuple[float, ...] = (4e-3,)
    tuning_seed: int = 100
    settings: dict[str, Any] = field(default_factory=dict)
    validate_only: bool = False
    comparisons: tuple[tuple[str, str], ...] = ()


EVERY_ARM = tuple(arm.key for arm in ARMS)
BRIEF = ("dense", "switch8", "larger_wide", "wide8", "larger_paper", "paper8", "separable8", "biases8")
MAIN = ("dense", "switch8", "paper8", "larger_paper", "upcycled_paper_raw", "switch8_upcycled")
SHORT = ("dense", "switch8", "paper8", "separable8")
SUBSETS = {"held_out": 400, "for_validation": 200}  # per task
MIXED = {"domains": tuple(DOMAINS), "batch": 5, "held_out": 8}  # every step has a block of each domain
COMPARED = ("dense", "switch8", "wide8", "paper8")  # what trials are compared with

PLANS = {
    "short": Plan("sentences", SHORT, 40, tuning=15, rates=(2.5e-4, 5e-4), settings=SUBSETS),
    "sentences": Plan("sentences", EVERY_ARM, 600, tuning=100, rates=(2e-4, 5e-4, 1e-3)),
    "language": Plan("language", EVERY_ARM, 1600, tuning=800, rates=(8e-3, 16e-3)),
    "t5": Plan("spans", MAIN, 1600, tuning=800, rates=(8e-3, 16e-3)),
    "t5_hidden": Plan(
        "spans", ("dense", "switch8_quarter", GROUP, SHARED), 1600, rates=(16e-3,), comparisons=SPANS_COMPARISONS
    ),
    "smollm": Plan("novels", ("lora16", "lora128", "adapter8"), 30, tuning=10, rates=(1e-3, 2e-3)),
    "smollm_domains": Plan(
        "novels",
        ("lora16", "lora48", "mixlora8", "adapter_hidden"),
        80,
        tuning=25,
        rates=(1e-3, 2e-3),
        settings=MIXED,
        comparisons=ADAPTER_COMPARISONS,
    ),
    "smollm_mask": Plan(
        "novels",
        ("dense", "full_hidden", "full_hidden_mask"),
        80,
        tuning=25,
        rates=(1e-4, 2e-4),
        settings=MIXED,
        comparisons=MASK_COMPARISONS,
    ),
    "language_brief": Plan("language", BRIEF, 1600, seeds=(0, 1), rates=(8e-3,)),
    "hidden": Plan("language", tuple(arm.key for arm in HIDDEN), 1600, rates=(16e-3,), comparisons=COMPARISONS),
    "hidden_best": Plan("language", BEST_PLAN, 1600, rates=(16e-3,), comparisons=BEST_COMPARISONS),
    "hidden_larger": Plan(
        "language", LARGER_PLAN, 6400, rates=(8e-3,), settings={"model": 96}, comparisons=LARGER_COMPARISONS
    ),
    "hidden_search": Plan(
        "language",
        ("dense", "switch8_quarter", "switch8_quarter_two", *(arm.key for arm in SEARCH)),
        1600,
        seeds=(10, 11),
        rates=(16e-3,),
        validate_only=True,
    ),
    "search": Plan("language", (*COMPARED, *(arm.key for arm in TRIALS)), 1600, seeds=(0,), rates=(8e-3,)),
}
