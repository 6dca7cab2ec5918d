"""Studies' tables in Markdown: what is finished, gains, paired t-tests; and which lines of a
success hold so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from scipy.stats import t as student

from mpoe_bench.study.plan import (
    LAYERS,
    Comparison,
    Corner,
    Records,
    Run,
    Study,
)


class Spread(NamedTuple):
    """Mean, sample standard deviation (``None`` for a single number) and count of some numbers."""

    mean: float
    deviation: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None, len(values))

    def verdict(self) -> str:
        """Whether a paired difference is more than the variation between seeds explains, at 95%."""
        if self.deviation is None:
            return "one seed"
        if abs(self.mean) <= student.ppf(0.975, self.number - 1) * self.deviation / math.sqrt(
            self.number
        ):
            return "not significant"
        return "better" if self.mean > 0 else "worse"

    def text(self, sign: bool = False) -> str:
        number = f"{self.mean:{'+' if sign else ''}.4f}"
        return number if self.deviation is None else f"{number} ± {self.deviation:.4f}"


def markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table's lines; what a row lacks at its end is empty."""
    shown = (
        [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows
    )
    whole = ([*cells, *[""] * (len(header) - len(cells))] for cells in shown)
    first, *others = (f"| {' | '.join(cells)} |" for cells in (list(map(str, header)), *whole))
    return [first, f"|{'---|' * len(header)}", *others, ""]


def chosen_rate(study: Study, model: int, arm: str, records: Records) -> float | None:
    """The known rate, or the candidate that is best on the validation split; ``None`` until every
    one has finished."""
    known = study.arms[arm].known_rate(model)
    if known is not None:
        return known
    runs = study.candidates(model, arm)
    if any(run.key not in records for run in runs):
        return None
    return min(runs, key=lambda run: records[run.key]["validation"]).rate


def runs_of(study: Study, corner: Corner, arm: str, records: Records) -> list[Run]:
    """The runs of an arm at a corner, one a seed; empty until its rate is chosen."""
    rate = chosen_rate(study, corner.model, arm, records)
    return [] if rate is None else [Run(corner, arm, rate, seed) for seed in study.seeds]


def finished(
    study: Study, corner: Corner, arm: str, records: Records
) -> dict[int, Mapping[str, Any]]:
    """seed -> record of an arm's finished runs at the rate that was chosen."""
    return {
        run.seed: records[run.key]
        for run in runs_of(study, corner, arm, records)
        if run.key in records
    }


def gain(study: Study, corner: Corner, arm: str, beside: str, records: Records) -> Spread | None:
    """How much lower ``arm``'s test loss is, seed by seed; ``None`` if no seed has both."""
    ours = finished(study, corner, arm, records)
    theirs = finished(study, corner, beside, records)
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    return Spread.of([theirs[seed]["test"] - ours[seed]["test"] for seed in seeds])


def judged(difference: Spread | None, study: Study, comparison: Comparison) -> str:
    """The verdict, or that seeds are missing."""
    if difference is None:
        return "waits"
    if difference.number < len(study.seeds):
        return "seeds are missing"
    if comparison.at_least is None:
        return difference.verdict()
    return "enough" if difference.mean >= comparison.at_least else "not enough"


def success(study: Study, records: Records) -> str:
    """Whether the study has succeeded, as far as it has gone."""
    needed: list[tuple[Corner, Comparison]] = [
        (at, one) for at, one in study.compared() if one.must_win
    ]
    if not needed:
        return "No comparison was written down as one that must be won."
    words = [
        judged(gain(study, at, one.arm, one.beside, records), study, one) for at, one in needed
    ]
    won = sum(word in ("better", "enough") for word in words)
    lost = sum(word in ("worse", "not significant", "not enough") for word in words)
    state = "has succeeded" if won == len(needed) else "has failed" if lost else "has no result yet"
    counts = f"of {len(needed)} comparisons that it must win, {won} are won and {lost} are not"
    return f"The study {state}: {counts}."


Section = tuple[
    str, str, Sequence[Any], Iterable[Sequence[Any]]
]  # title, words, and a table's header and rows


def page(title: str, lead: Sequence[str], sections: Iterable[Section]) -> str:
    """A study's page; a section without a title goes on with the one before."""
    lines = [f"# {title}", ""]
    for words in lead:
        lines += [words, ""]
    for title, words, header, rows in sections:
        if title:
            lines += [f"## {title}", ""]
        if words:
            lines += [words, ""]
        lines += markdown(header, rows)
    return "\n".join(lines).rstrip() + "\n"


def of_corner(study: Study, corner: Corner, arms: Sequence[str], records: Records) -> Section:
    """One row for every arm of a corner, also of those that wait."""
    header = [
        "arm",
        "rate",
        "seeds",
        "steps",
        "FFN weights, x dense",
        "with router and biases",
        "FFN FLOPs, x dense",
    ]
    header += ["test loss", f"gain over {study.arms[study.reference].name}"]
    rows: list[Sequence[str]] = []
    for arm in arms:
        done = list(finished(study, corner, arm, records).values())
        if not done:
            rows.append((study.arms[arm].name, "waits", f"0 of {len(study.seeds)}"))
            continue
        first = done[0]
        over = "-"
        if arm != study.reference:
            difference = gain(study, corner, arm, study.reference, records)
            if difference is not None:
                over = f"{difference.text(sign=True)} ({difference.verdict()})"
        cells = (
            study.arms[arm].name,
            f"{chosen_rate(study, corner.model, arm, records):g}",
            f"{len(done)} of {len(study.seeds)}",
            f"{first['steps']:,}",
            f"{first['weights']:.2f}",
            f"{first['parameters']:.2f}",
            f"{first['flops']:.2f}",
            Spread.of([record["test"] for record in done]).text(),
            over,
        )
        rows.append(cells)
    layers = "" if corner.layers == LAYERS else f", {corner.layers} layers"
    return f"Model of size {corner.model}, {corner.steps:,} steps{layers}", "", header, rows


def of_comparisons(study: Study, records: Records) -> Section:
    """Every comparison that was written down, and its result so far."""
    rows = []
    compared = study.compared()
    for corner, one in compared:
        difference = gain(study, corner, one.arm, one.beside, records)
        must_win = "x" if one.must_win else ""
        names = corner, study.arms[one.arm].name, study.arms[one.beside].name, must_win
        result = (difference.number, difference.text(sign=True)) if difference else (0, "")
        rows.append((*names, *result, judged(difference, study, one)))
    thresholds = [one.at_least for _, one in compared if one.at_least is not None]
    tests = len(compared) - len(thresholds)
    words = (
        f"{tests} paired t-tests over seeds, at 95%: by chance alone, {0.05 * tests:.1f} of them "
        "would be significant. *Must win*: the study succeeds only if all of these are better."
    )
    if thresholds:
        words += " *Enough*: the mean gain is at least what the study's file names."
    header = "corner", "arm", "beside", "must win", "seeds", "gain", ""
    return "Comparisons written down before the first run", words, header, rows


def of_routers(study: Study, records: Records) -> Section:
    """What the routers do, in the mean over finished seeds."""
    names = ("entropy", "mass", "token", "domain", "use")
    rows = []
    for corner, arms in study.corners().items():
        for arm in arms:
            done = finished(study, corner, arm, records).values()
            routers = [record["router"] for record in done if record.get("router")]
            if routers:
                means = [fmean(router[name] for router in routers) for name in names]
                rows.append((corner, study.arms[arm].name, *means))
    words = (
        "Entropy of a token's probabilities (0 decided, 1 undecided) and the mass of its chosen "
        "experts; how much the byte and the domain tell about the expert, less what chance tells; "
        "entropy of the shares of all tokens. All but the mass are relative to log E."
    )
    return "Routers", words, ("corner", "arm", *names), rows


def of_rates(study: Study, records: Records) -> list[Section]:
    """Validation losses of the candidates."""
    title = "Rates"
    words = f"Validation loss after {study.rate_steps:,} steps, seed {study.seeds[0]}."
    sections: list[Section] = []
    for model, rates in study.rates.items():
        rows = []
        for arm in study.arms:
            keys = [run.key for run in study.candidates(model, arm)]
            if any(key in records for key in keys):
                losses = (
                    f"{records[key]['validation']:.4f}" if key in records else "" for key in keys
                )
                rows.append((study.arms[arm].name, *losses))
        header = f"model of size {model}", *(f"{rate:g}" for rate in rates)
        sections.append(("" if sections else title, "" if sections else words, header, rows))
    return sections


def study_table(study: Study, records: Records) -> str:
    """The whole page."""
    corners = [of_corner(study, corner, arms, records) for corner, arms in study.corners().items()]
    sections = [
        *corners,
        of_comparisons(study, records),
        of_routers(study, records),
        *of_rates(study, records),
    ]
    return page(study.title, [study.question, success(study, records)], sections)
