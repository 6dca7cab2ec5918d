"""A study's table in Markdown: what is finished, gains over the reference, and the comparisons' paired t-tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import t as student

from mpoe_bench.study.plan import Comparison, Corner, Run, Study

Records = Mapping[str, Mapping[str, Any]]  # a run's key -> its record


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (``None`` for a single number) and count of some numbers."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        mean = sum(values) / len(values)
        if len(values) == 1:
            return cls(mean, None, 1)
        return cls(mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)), len(values))

    def verdict(self) -> str:
        """Whether a paired difference is more than the variation between seeds explains, at 95%."""
        if self.deviation is None:
            return "one seed"
        if abs(self.mean) <= student.ppf(0.975, self.count - 1) * self.deviation / math.sqrt(self.count):
            return "not significant"
        return "better" if self.mean > 0 else "worse"

    def text(self, sign: bool = False) -> str:
        number = f"{self.mean:{'+' if sign else ''}.4f}"
        return number if self.deviation is None else f"{number} ± {self.deviation:.4f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines."""
    first, *others = (f"| {' | '.join(map(str, cells))} |" for cells in (header, *rows))
    return [first, f"|{'---|' * len(header)}", *others, ""]


def chosen_rate(study: Study, model: int, arm: str, records: Records) -> float | None:
    """The candidate that is best on the validation split; ``None`` until every candidate has finished."""
    runs = study.candidates(model, arm)
    if any(run.key not in records for run in runs):
        return None
    return min(runs, key=lambda run: records[run.key]["validation"]).rate


def runs_of(study: Study, corner: Corner, arm: str, records: Records) -> list[Run]:
    """The runs of an arm at a corner, one a seed; empty until its rate is chosen."""
    rate = chosen_rate(study, corner.model, arm, records)
    return [] if rate is None else [Run(corner, arm, rate, seed) for seed in study.seeds]


def finished(study: Study, corner: Corner, arm: str, records: Records) -> dict[int, Mapping[str, Any]]:
    """seed -> record of an arm's finished runs at the rate that was chosen."""
    return {run.seed: records[run.key] for run in runs_of(study, corner, arm, records) if run.key in records}


def gain(study: Study, corner: Corner, arm: str, beside: str, records: Records) -> Spread | None:
    """How much lower ``arm``'s test loss is, seed by seed; ``None`` if no seed has both."""
    own, other = (finished(study, corner, key, records) for key in (arm, beside))
    both = sorted(own.keys() & other.keys())
    return Spread.of([other[seed]["test"] - own[seed]["test"] for seed in both]) if both else None


def corner_table(study: Study, corner: Corner, arms: Sequence[str], records: Records) -> list[str]:
    """One row for every arm of a corner, also of those that wait."""
    header = ["arm", "rate", "seeds", "steps", "FFN weights, x dense", "with router and biases", "FFN FLOPs, x dense"]
    header += ["test loss", f"gain over {study.arms[study.reference].name}", "CPU s"]
    rows: list[Sequence[str]] = []
    for arm in arms:
        done = list(finished(study, corner, arm, records).values())
        if not done:
            rows.append((study.arms[arm].name, "waits", f"0 of {len(study.seeds)}", *[""] * 7))
            continue
        first = done[0]
        over = None if arm == study.reference else gain(study, corner, arm, study.reference, records)
        cells = (
            study.arms[arm].name,
            f"{chosen_rate(study, corner.model, arm, records):g}",
            f"{len(done)} of {len(study.seeds)}",
            f"{first['steps']:,}",
            *(f"{first[name]:.2f}" for name in ("weights", "parameters", "flops")),
            Spread.of([record["test"] for record in done]).text(),
            "-" if over is None else f"{over.text(sign=True)} ({over.verdict()})",
            f"{sum(record['cpu_seconds'] for record in done) / len(done):.0f}",
        )
        rows.append(cells)
    return [f"## Model of size {corner.model}, {corner.steps:,} steps", "", *markdown(header, rows)]


def comparison_table(study: Study, records: Records) -> list[str]:
    """Every comparison that was written down, and its result so far."""
    rows, tests = [], study.compared()
    for corner, one in tests:
        found = gain(study, corner, one.arm, one.beside, records)
        names = corner, study.arms[one.arm].name, study.arms[one.beside].name, "x" if one.must_win else ""
        result = ("0", "", "waits")
        if found is not None:
            result = str(found.count), found.text(sign=True), judged(found, study)
        rows.append((*names, *result))
    return [
        "## Comparisons written down before the first run",
        "",
        f"{len(tests)} paired t-tests over seeds, at 95%: by chance alone, {0.05 * len(tests):.1f} of them would be"
        " significant. *Must win*: the study succeeds only if all of these are better.",
        "",
        *markdown(("corner", "arm", "beside", "must win", "seeds", "gain", ""), rows),
    ]


def judged(found: Spread, study: Study) -> str:
    """The verdict, or that seeds are missing."""
    return found.verdict() if found.count == len(study.seeds) else "seeds are missing"


def success(study: Study, records: Records) -> str:
    """Whether the study has succeeded, as far as it has gone."""
    needed: list[tuple[Corner, Comparison]] = [(at, one) for at, one in study.compared() if one.must_win]
    found = [gain(study, at, one.arm, one.beside, records) for at, one in needed]
    words = ["waits" if spread is None else judged(spread, study) for spread in found]
    won = words.count("better")
    lost = sum(word in ("worse", "not significant") for word in words)
    state = "has succeeded" if won == len(needed) else "has failed" if lost else "has no result yet"
    return f"The study {state}: of {len(needed)} comparisons that it must win, {won} are won and {lost} are not."


def router_table(study: Study, records: Records) -> list[str]:
    """What the routers do, in the mean over finished seeds."""
    names, rows = ("entropy", "mass", "token", "domain", "use"), []
    for corner, arms in study.corners().items():
        for arm in arms:
            done = [r["router"] for r in finished(study, corner, arm, records).values() if r.get("router")]
            if done:
                means = (f"{sum(facts[name] for facts in done) / len(done):.3f}" for name in names)
                rows.append((corner, study.arms[arm].name, *means))
    return [
        "## Routers",
        "",
        "Entropy of a token's probabilities (0 decided, 1 undecided) and the mass of its chosen experts; how much the"
        " byte and the domain tell about the expert, less what chance tells; entropy of the shares of all tokens. All"
        " but the mass are relative to log E.",
        "",
        *markdown(("corner", "arm", *names), rows),
    ]


def rate_table(study: Study, records: Records) -> list[str]:
    """Validation losses of the candidates."""
    lines = ["## Rates", "", f"Validation loss after {study.rate_steps:,} steps, seed {study.seeds[0]}.", ""]
    for model, rates in study.rates.items():
        rows = []
        for arm in study.arms:
            keys = [run.key for run in study.candidates(model, arm)]
            if any(key in records for key in keys):
                losses = (f"{records[key]['validation']:.4f}" if key in records else "" for key in keys)
                rows.append((study.arms[arm].name, *losses))
        lines += markdown((f"model of size {model}", *(f"{rate:g}" for rate in rates)), rows)
    return lines


def study_table(study: Study, records: Records) -> str:
    """The whole page."""
    lines = [f"# {study.title}", "", study.question, "", success(study, records), ""]
    for corner, arms in study.corners().items():
        lines += corner_table(study, corner, arms, records)
    lines += comparison_table(study, records) + router_table(study, records) + rate_table(study, records)
    return "\n".join(lines).rstrip() + "\n"
