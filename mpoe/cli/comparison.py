"""The tables of `mpoe compare`, with a row for each fact and a column for each run."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpoe.cli.run_folder import PARAMETERS, RunFolder

_NONE = "-"
_LOWER_IS_BETTER = ("perplexity", "loss")
_SEEDS = ("seed", "data_seed", "gradient_mask_seed")
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass(frozen=True)
class Comparison:
    """A table.

    Attributes:
        title: heading.
        words: how to read it.
        header: names of the columns; the first one names the rows.
        rows: a name, and one value for every run.
        best: (row, column) of the best values, if the values differ.
    """

    title: str
    words: str
    header: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]] = field(default_factory=set)


def compare(runs: Sequence[RunFolder]) -> list[Comparison]:
    """The tables of a comparison; those without rows are left out."""
    found = [_what(runs), _scores(runs), _arms(runs), _parameters(runs), _settings(runs)]
    return [table for table in found if table.rows]


def _what(runs: Sequence[RunFolder]) -> Comparison:
    def seconds(run: RunFolder) -> str:
        return f"{run.results['seconds']:.0f}" if run.results else _NONE

    def per_step(run: RunFolder) -> str:
        times = list(_times_of_steps(run.records))
        return f"{sorted(times)[len(times) // 2]:.3g}" if times else _NONE

    def last(run: RunFolder, key: str) -> str:
        values = [record[key] for record in run.records if record.get(key) is not None]
        return f"{values[-1]:.4f}" if values else _NONE

    def ended(run: RunFolder) -> str:
        steps = run.results.get("steps") or max((record.get("step", 0) for record in run.records), default=0)
        return f"{steps:,}" if run.results else f"{steps:,}, not ended"

    rows = [
        ["started from", *(str(run.results.get("model") or run.settings.get("model", _NONE)) for run in runs)],
        ["feed-forward layers", *(run.mixture or _NONE for run in runs)],
        ["optimizer steps", *map(ended, runs)],
        ["learning rate", *(f"{run.settings.get('training.learning_rate', 0):g}" for run in runs)],
        ["training loss, last logged", *(last(run, "loss") for run in runs)],
        ["training, seconds", *map(seconds, runs)],
        ["seconds per step, median", *map(per_step, runs)],
    ]
    words = "Seconds: since a run was last started; per step: between two log lines without an evaluation or a save."
    return Comparison("Runs", words, _header("", runs), rows)


def _times_of_steps(records: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Seconds per step between neighbouring log lines of training."""
    for earlier, later in itertools.pairwise(records):
        if "loss" in earlier and "loss" in later and later["step"] > earlier["step"]:
            yield (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])


def _metrics(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """(task, metric) of all scores, in order."""
    found = [
        (task, metric)
        for run in runs
        for task, values in run.results.get("validation", {}).items()
        for metric in values
        if metric != "items"
    ]
    return list(dict.fromkeys(found))


def _scores(runs: Sequence[RunFolder]) -> Comparison:
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for task, metric in _metrics(runs):
        values = [run.results.get("validation", {}).get(task, {}).get(metric) for run in runs]
        baselines = [run.results.get("baselines", {}).get(task, {}).get(metric) for run in runs]
        there = [value for value in values if value is not None]
        winner = (min if metric in _LOWER_IS_BETTER else max)(there)
        if min(there) < max(there):
            best |= {(len(rows), column) for column, value in enumerate(values, start=1) if value == winner}
        baseline = next((f"{value:.4f}" for value in baselines if value is not None), _NONE)
        shown = [_NONE if value is None else f"{value:.4f}" for value in values]
        rows.append([f"{task}: {metric}", *shown, baseline])
    words = (
        "Validation, after the last step; * is the best of a row. One run each: another seed moves a score as well, so "
        "compare several seeds before a small difference is believed. Baseline: one answer for all items."
    )
    return Comparison("Scores", words, [*_header("", runs), "baseline"], rows, best)


def arms_of(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Finished runs that differ in nothing but their seeds, by what their feed-forward layers are; where several arms
    have the same, the name of their first run is added."""
    from mpoe.training.output_dir import is_neutral

    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        own = {key: value for key, value in run.settings.items() if not is_neutral(key)}
        key = repr(sorted((name, str(v)) for name, v in own.items() if name.rpartition(".")[2] not in _SEEDS))
        if run.results:
            groups.setdefault(key, []).append(run)
    kinds = [alike[0].mixture for alike in groups.values()]
    return {
        kind if kinds.count(kind) == 1 else f"{kind} ({alike[0].name})": alike
        for kind, alike in zip(kinds, groups.values(), strict=True)
    }


def mean_and_half_width(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95% interval (Student's t) if there are several values."""
    if len(values) < 2:
        return f"{values[0]:.4f}" if values else _NONE
    half = _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def _arms(runs: Sequence[RunFolder]) -> Comparison:
    """Means over seeds; without rows if no arm has several runs."""
    arms = arms_of(runs)
    rows = []
    if any(len(alike) > 1 for alike in arms.values()):
        rows = [["runs", *(str(len(alike)) for alike in arms.values())]]
        rows.append(["parameters", *(f"{alike[0].results['parameters']['total']:,}" for alike in arms.values())])
        for task, metric in _metrics(runs):
            scores = [[run.results["validation"].get(task, {}).get(metric) for run in alike] for alike in arms.values()]
            there = [[value for value in values if value is not None] for values in scores]
            rows.append([f"{task}: {metric}", *map(mean_and_half_width, there)])
    words = "Runs that differ in their seeds alone are one arm: mean ± half of its 95% interval (Student's t)."
    return Comparison("Arms", words, ["", *arms], rows)


def _parameters(runs: Sequence[RunFolder]) -> Comparison:
    rows = []
    for kind in PARAMETERS:
        counts = [run.results.get("parameters", {}).get(kind) for run in runs]
        if any(counts):
            rows.append([kind, *(_NONE if not count else f"{count:,}" for count in counts)])
    words = "; ".join(f"{row[0]}: {PARAMETERS[row[0]]}" for row in rows) + "."
    return Comparison("Parameters", words, _header("", runs), rows)


def _settings(runs: Sequence[RunFolder]) -> Comparison:
    from mpoe.training.output_dir import is_neutral

    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if not is_neutral(key) and any(value != values[0] for value in values):
            rows.append([key, *(_NONE if value is None else str(value) for value in values)])
    words = "Settings of run.json that are not the same in all runs and may change what a run computes."
    return Comparison("Settings that differ", words, _header("", runs), rows)


def _header(first: str, runs: Sequence[RunFolder]) -> list[str]:
    return [first, *(run.name for run in runs)]
