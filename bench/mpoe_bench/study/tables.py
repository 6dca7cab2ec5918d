"""Studies' tables in Markdown: what is finished, gains, paired t-tests; and which lines of a
success hold so far."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from scipy.stats import ttest_1samp

from mpoe_bench.study.plan import LAYERS, Comparison, Corner, Record, Records, Run, Study

# Title, words, and a table's header and rows.
Section = tuple[str, str, Sequence, Iterable]


class Spread(NamedTuple):
    """Some numbers, one a seed."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def verdict(self) -> str:
        """Whether a paired difference is more than the variation between seeds explains, at 95%."""
        if len(self.values) == 1:
            return "one seed"
        if not ttest_1samp(self.values, 0).pvalue < 0.05:  # NaN, where all are zero
            return "not significant"
        return "better" if self.mean > 0 else "worse"

    def text(self, sign: str = "") -> str:
        """The mean and, of several, the sample standard deviation."""
        number = f"{self.mean:{sign}.4f}"
        return number if len(self.values) == 1 else f"{number} ± {stdev(self.values):.4f}"


def markdown(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """A table's lines; what a row lacks at its end is empty."""
    lines = [f"| {' | '.join(map(str, header))} |", f"|{'---|' * len(header)}"]
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        cells += [""] * (len(header) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


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


@dataclass(frozen=True)
class ArmsResults:
    """What the finished runs of a study with arms say."""

    study: Study
    records: Records

    def chosen_rate(self, model: int, arm: str) -> float | None:
        """The known rate, or the candidate that is best on the validation split; ``None`` until
        every one of them has finished."""
        known = self.study.arms[arm].known_rate(model)
        if known is not None:
            return known
        candidates = self.study.candidates(model, arm)
        if any(run.key not in self.records for run in candidates):
            return None
        return min(candidates, key=lambda run: self.records[run.key]["validation"]).rate

    def runs_of(self, corner: Corner, arm: str) -> list[Run]:
        """The runs of an arm at a corner, one a seed; empty until its rate is chosen."""
        rate = self.chosen_rate(corner.model, arm)
        if rate is None:
            return []
        return [Run(corner, arm, rate, seed) for seed in self.study.seeds]

    def finished(self, corner: Corner, arm: str) -> dict[int, Record]:
        """seed -> record of an arm's finished runs at the rate that was chosen."""
        runs = self.runs_of(corner, arm)
        return {run.seed: self.records[run.key] for run in runs if run.key in self.records}

    def gain(self, corner: Corner, arm: str, beside: str) -> Spread | None:
        """How much lower ``arm``'s test loss is, seed by seed; ``None`` if no seed has both."""
        ours = self.finished(corner, arm)
        theirs = self.finished(corner, beside)
        seeds = sorted(ours.keys() & theirs.keys())
        gains = [theirs[seed]["test"] - ours[seed]["test"] for seed in seeds]
        return Spread(gains) if gains else None

    def judged(self, corner: Corner, comparison: Comparison) -> str:
        """The verdict, or that seeds are missing."""
        gain = self.gain(corner, comparison.arm, comparison.beside)
        if gain is None:
            return "waits"
        if len(gain.values) < len(self.study.seeds):
            return "seeds are missing"
        if comparison.at_least is None:
            return gain.verdict()
        return "enough" if gain.mean >= comparison.at_least else "not enough"

    def success(self) -> str:
        """Whether the study has succeeded, as far as it has gone."""
        compared = self.study.compared()
        verdicts = [self.judged(corner, one) for corner, one in compared if one.must_win]
        if not verdicts:
            return "No comparison was written down as one that must be won."
        won = sum(word in ("better", "enough") for word in verdicts)
        lost = sum(word in ("worse", "not significant", "not enough") for word in verdicts)
        state = "has failed" if lost else "has no result yet"
        if won == len(verdicts):
            state = "has succeeded"
        return (
            f"The study {state}: of {len(verdicts)} comparisons that it must win, {won} are won "
            f"and {lost} are not."
        )

    def of_corner(self, corner: Corner, arms: Sequence[str]) -> Section:
        """One row for every arm of a corner, also of those that wait."""
        study = self.study
        header = ["arm", "rate", "seeds", "steps", "FFN weights, x dense", "with router and biases"]
        header += ["FFN FLOPs, x dense", "test loss"]
        header.append(f"gain over {study.arms[study.reference].name}")
        rows = []
        for arm in arms:
            done = list(self.finished(corner, arm).values())
            seeds = f"{len(done)} of {len(study.seeds)}"
            name = study.arms[arm].name
            if not done:
                rows.append((name, "waits", seeds))
                continue
            gain = None if arm == study.reference else self.gain(corner, arm, study.reference)
            row = [name, f"{self.chosen_rate(corner.model, arm):g}", seeds]
            row.append(f"{done[0]['steps']:,}")
            row += [f"{done[0][cost]:.2f}" for cost in ("weights", "parameters", "flops")]
            row.append(Spread([record["test"] for record in done]).text())
            row.append("-" if gain is None else f"{gain.text('+')} ({gain.verdict()})")
            rows.append(row)
        layers = "" if corner.layers == LAYERS else f", {corner.layers} layers"
        return f"Model of size {corner.model}, {corner.steps:,} steps{layers}", "", header, rows

    def of_comparisons(self) -> Section:
        """Every comparison that was written down, and its result so far."""
        rows = []
        arms = self.study.arms
        compared = self.study.compared()
        for corner, one in compared:
            gain = self.gain(corner, one.arm, one.beside)
            row = [corner, arms[one.arm].name, arms[one.beside].name]
            row.append("x" if one.must_win else "")
            if gain is None:
                row += [0, ""]
            else:
                row += [len(gain.values), gain.text("+")]
            rows.append([*row, self.judged(corner, one)])
        tests = sum(one.at_least is None for _, one in compared)
        words = (
            f"{tests} paired t-tests over seeds, at 95%: by chance alone, {0.05 * tests:.1f} of "
            "them would be significant. *Must win*: the study succeeds only if all of these are "
            "better."
        )
        if tests < len(compared):
            words += " *Enough*: the mean gain is at least what the study's file names."
        header = "corner", "arm", "beside", "must win", "seeds", "gain", ""
        return "Comparisons written down before the first run", words, header, rows

    def of_rates(self) -> list[Section]:
        """Validation losses of the candidates."""
        study = self.study
        title = "Rates"
        words = f"Validation loss after {study.rate_steps:,} steps, seed {study.seeds[0]}."
        sections = []
        for model, rates in study.rates.items():
            rows = []
            for arm in study.arms:
                records = [self.records.get(run.key) for run in study.candidates(model, arm)]
                cells = [f"{record['validation']:.4f}" if record else "" for record in records]
                if any(cells):
                    rows.append((study.arms[arm].name, *cells))
            header = f"model of size {model}", *(f"{rate:g}" for rate in rates)
            sections.append((title, words, header, rows))
            title = words = ""
        return sections

    def page(self) -> str:
        """The whole page."""
        corners = self.study.corners().items()
        sections = [self.of_corner(corner, arms) for corner, arms in corners]
        sections += [self.of_comparisons(), *self.of_rates()]
        return page(self.study.title, [self.study.question, self.success()], sections)
