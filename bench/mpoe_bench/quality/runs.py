"""Run a plan: every finished run has its own file, so that a stopped plan continues where it stopped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.quality.arms import ADAPTERS, ARMS, MIXTURE_OF_LORA, Arm
from mpoe_bench.quality.files import write_json, write_text
from mpoe_bench.quality.hidden import BEST, HIDDEN, HIDDEN_ADAPTERS, LARGER
from mpoe_bench.quality.hidden_search import SEARCH
from mpoe_bench.quality.plans import Plan
from mpoe_bench.quality.search import TRIALS
from mpoe_bench.quality.statistics import score_of
from mpoe_bench.quality.training import Budget, run_arm

RESULTS_FILE = "results.jsonl"
PLAN_FILE = "plan.json"
RUNS, TUNING = "runs", "tuning"
EVERY_ARM = (
    *(*ARMS, *TRIALS, *ADAPTERS, MIXTURE_OF_LORA, *HIDDEN_ADAPTERS),
    *(*(arm for arm in HIDDEN if arm.key != "dense"), *BEST, *LARGER, *SEARCH),
)
BEYOND = 4  # how many rates beyond the plan's tuning may try


def arm_of(key: str) -> Arm:
    """The arm called ``key``.

    Raises:
        ValueError: there is none.
    """
    known = {arm.key: arm for arm in EVERY_ARM}
    if key not in known:
        raise ValueError(f"arms must be among {', '.join(known)}; got {key!r}")
    return known[key]


def field_settings(field: Any) -> dict[str, Any]:
    """What a result depends on besides the plan, except where the data are."""
    names = [f.name for f in dataclasses.fields(field) if f.name not in ("data_dir", "given")]
    values = {name: getattr(field, name) for name in names}
    return json.loads(json.dumps(values, default=list))


def open_folder(folder: Path, plan: Plan, field: Any) -> None:
    """Create ``folder`` for this plan, or check that it holds this plan.

    Raises:
        ValueError: it holds runs of another plan or of other settings; arms and seeds may be added.
    """
    fixed = {key: value for key, value in dataclasses.asdict(plan).items() if key not in ("arms", "seeds")}
    wanted = json.loads(json.dumps({"plan": fixed, "field": field_settings(field)}))
    file = folder / PLAN_FILE
    if file.exists():
        found = json.loads(file.read_text())
        if found != wanted:
            raise ValueError(f"out {folder} holds runs of another plan, {found}; choose another folder for {wanted}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, wanted)


def run_plan(plan: Plan, field: Any, folder: Path, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Run whatever ``folder`` lacks of ``plan``, seed by seed; returns all records in the folder.

    Raises:
        ValueError: see `open_folder`, `arm_of`.
    """
    arms = [arm_of(key) for key in plan.arms]
    open_folder(folder, plan, field)
    rates = {arm.key: tuned_rate(plan, field, arm_of(arm.rate_of or arm.key), folder, log) for arm in arms}
    for seed in plan.seeds:
        for arm in arms:
            budget = Budget(plan.steps, rates[arm.key], seed)
            record = _run(field, arm, budget, folder / RUNS / f"{arm.key}-{seed}.json", plan.validate_only)
            log(
                f"{arm.key}, seed {seed}: {field.measure} {score_of(record):.4f}, rate {budget.rate:g}, "
                f"{record['cpu_seconds']:.0f} CPU seconds"
            )
    records = load_records(folder)
    write_text(folder / RESULTS_FILE, "".join(json.dumps(record) + "\n" for record in records))
    return records


def tuned_rate(plan: Plan, field: Any, arm: Arm, folder: Path, log: Callable[[str], None]) -> float:
    """The rate that is best on the validation split after ``plan.tuning`` steps.

    While the best rate is the smallest or largest tried, its half or double is tried too (at most `BEYOND` times), so
    that no arm's rate is limited by the plan's list.
    """
    if not plan.tuning or len(plan.rates) == 1:
        return plan.rates[0]
    sign = 1.0 if field.lower_is_better else -1.0
    scores: dict[float, float] = {}
    waiting = list(plan.rates)
    while waiting:
        for rate in waiting:
            budget = Budget(plan.tuning, rate, plan.tuning_seed)
            record = _run(field, arm, budget, folder / TUNING / f"{arm.key}-{rate:g}.json", tuning=True)
            scores[rate] = record["validation"]
        best = min(scores, key=lambda rate: sign * scores[rate])
        waiting = []
        if len(scores) < len(plan.rates) + BEYOND and best in (min(scores), max(scores)):
            waiting = [best / 2 if best == min(scores) else best * 2]
    log(f"{arm.key}: rate {best:g} of {', '.join(f'{rate:g} ({score:.4f})' for rate, score in sorted(scores.items()))}")
    return best


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Every finished run in ``folder``, by arm and seed, without the tuning runs."""
    records = [json.loads(file.read_text()) for file in (folder / RUNS).glob("*.json")]
    if not records and (folder / RESULTS_FILE).exists():
        records = [json.loads(line) for line in (folder / RESULTS_FILE).read_text().splitlines()]
    return sorted(records, key=lambda record: (record["arm"], record["budget"]["seed"]))


def _run(field: Any, arm: Arm, budget: Budget, file: Path, tuning: bool = False) -> dict[str, Any]:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, run_arm(field, arm, budget, tuning))
    return json.loads(file.read_text())


def by_arm(records: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(key, records by seed) of every arm, in the order of `EVERY_ARM`."""
    for arm in EVERY_ARM:
        own = [record for record in records if record["arm"] == arm.key]
        if own:
            yield arm.key, own
