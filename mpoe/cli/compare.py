"""`mpoe compare RUN_DIR RUN_DIR ...`: training runs side by side, on the terminal and as a report.

It shows parameters, the settings that differ, scores, curves and time. Unfinished runs are shown as far as they got."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError
from mpoe.cli.files import REPORT_FILE, write_json
from mpoe.cli.parsing import option, read_command
from mpoe.cli.runs import PARAMETERS, RunFolder, read_run
from mpoe.training.output_dir import RUN_FILE, check_folder, is_neutral

MOST_RUNS = 12
NUMBERS_FILE = "compare.json"
_NONE = "-"
_LOWER_IS_BETTER = ("perplexity", "loss")
_SEEDS = ("seed", "data_seed", "gradient_mask_seed")
# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)


@dataclass
class CompareOptions:
    """Options that only `compare` has."""

    _argument_group_name = "comparison"

    output_dir: str = option("mpoe_compare", "folder for report.html and compare.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    names: list[str] = option([], "what the runs are called, in their order; default: their folders' names")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    usage = "mpoe compare RUN_DIR RUN_DIR ... [--flag value ...]"
    asked = read_command(usage, __doc__, [CompareOptions], arguments, words=MOST_RUNS)
    if asked is not None:
        run(asked.words, asked.options[0])


def run(paths: Sequence[str], options: CompareOptions, further: Sequence[Any] = ()) -> None:
    """Compare the runs in folders ``paths``; prints tables and writes the report, with ``further`` tables."""
    if len(paths) < 2:
        raise CommandError(f"compare needs two runs or more; got {len(paths)}: mpoe compare RUN_DIR RUN_DIR ...")
    folder = check_report_folder(options.output_dir, options.overwrite)
    runs = [read_run(path, name) for path, name in zip(paths, _names(paths, options.names), strict=True)]
    from mpoe.cli.report import Table

    tables = [Table(**each, kind="runs") for each in _tables(runs) if each["rows"]] + list(further)
    for table in tables:
        table.show(least_width=120)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NUMBERS_FILE, [vars(run) for run in runs])
    _write(folder / REPORT_FILE, runs, tables)
    print(f"report and numbers are in {folder}; open {folder / REPORT_FILE}")


def check_report_folder(output_dir: str, overwrite: bool) -> Path:
    """The folder of a report, unless it holds a model, a run or (without ``overwrite``) an earlier report."""
    folder = check_folder("output_dir", Path(output_dir))
    if (folder / "config.json").exists() or (folder / RUN_FILE).exists():
        raise CommandError(f"output_dir {folder} holds a model or a run; choose another folder")
    if (folder / REPORT_FILE).exists() and not overwrite:
        raise CommandError(f"output_dir {folder} holds an earlier report; give --overwrite, or another --output_dir")
    return folder


def _names(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Unique names of the runs: the given ones, the folders' names, or the whole paths."""
    if names and len(names) != len(paths):
        raise CommandError(f"names must be one for each of the {len(paths)} runs; got {len(names)}")
    own = list(names) or [Path(path).resolve().name for path in paths]
    return own if len(set(own)) == len(own) else [f"{k} {name}" for k, name in enumerate(own, start=1)]


def _write(file: Path, runs: Sequence[RunFolder], tables: Sequence[Any]) -> None:
    from markupsafe import Markup

    from mpoe.cli.report import figures, note, write_page

    first, *others = (table.section() for table in tables)
    parts = [Markup("<h1>{}</h1>").format(" / ".join(run.name for run in runs)), first]
    parts += [Markup("<h2>Curves</h2>"), figures(lambda: _drawings(runs))]
    parts += [note("Pale lines are the raw values, the others running means; dots are evaluations."), *others]
    commands = [f"{run.name}: {run.settings['command']}" for run in runs if run.settings.get("command")]
    if commands:
        parts += [Markup("<h2>Commands</h2>"), *(Markup("<pre>{}</pre>").format(line) for line in commands)]
    write_page(file, "mpoe compare", parts)


def _drawings(runs: Sequence[RunFolder]) -> Iterator[str]:
    from mpoe.cli import plots

    training = {r.name: plots.curve(r.records, "task_loss") or plots.curve(r.records, "loss") for r in runs}
    yield plots.loss_curves(training, "Training: task loss")
    validation = {
        run.name if task == "validation" else f"{run.name}, {task}": points
        for run in runs
        for task, points in plots.validation_losses(run.records).items()
    }
    if validation:
        yield plots.loss_curves(validation, "Validation loss", "o")
    sizes = {run.name: run.results["parameters"] for run in runs if run.results.get("parameters")}
    if sizes:
        yield plots.size_bars(sizes)


# -------------------------------------------------- tables: a row for each fact, a column for each run


def _tables(runs: Sequence[RunFolder]) -> list[dict[str, Any]]:
    header = ["", *(run.name for run in runs)]
    parameters = _parameter_rows(runs)
    return [
        {
            "title": "Runs",
            "header": header,
            "rows": _what(runs),
            "words": "Seconds: since a run was last started; per step: between two log lines without an evaluation or "
            "a save.",
        },
        {"title": "Scores", "header": [*header, "baseline"], **_scores(runs)},
        _arms(runs),
        {
            "title": "Parameters",
            "header": header,
            "rows": parameters,
            "words": "; ".join(f"{row[0]}: {PARAMETERS[row[0]]}" for row in parameters) + ".",
        },
        {
            "title": "Settings that differ",
            "header": header,
            "rows": _settings(runs),
            "words": "Settings of run.json that are not the same in all runs and may change what a run computes.",
        },
    ]


def _what(runs: Sequence[RunFolder]) -> list[list[str]]:
    def per_step(run: RunFolder) -> str:
        times = sorted(_times_of_steps(run.records))
        return f"{times[len(times) // 2]:.3g}" if times else _NONE

    def last_loss(run: RunFolder) -> str:
        values = [record["loss"] for record in run.records if record.get("loss") is not None]
        return f"{values[-1]:.4f}" if values else _NONE

    def ended(run: RunFolder) -> str:
        steps = run.results.get("steps") or max((record.get("step", 0) for record in run.records), default=0)
        return f"{steps:,}" if run.results else f"{steps:,}, not ended"

    return [
        ["started from", *(str(run.results.get("model") or run.settings.get("model", _NONE)) for run in runs)],
        ["feed-forward layers", *(run.mixture or _NONE for run in runs)],
        ["optimizer steps", *map(ended, runs)],
        ["learning rate", *(f"{run.settings.get('training.learning_rate', 0):g}" for run in runs)],
        ["training loss, last logged", *map(last_loss, runs)],
        ["training, seconds", *(f"{run.results['seconds']:.0f}" if run.results else _NONE for run in runs)],
        ["seconds per step, median", *map(per_step, runs)],
    ]


def _times_of_steps(records: Sequence[dict[str, Any]]) -> Iterator[float]:
    """Seconds per step between neighbouring log lines of training."""
    for earlier, later in itertools.pairwise(records):
        if "loss" in earlier and "loss" in later and later["step"] > earlier["step"]:
            yield (later["time"] - earlier["time"]) / (later["step"] - earlier["step"])


def _metrics(runs: Sequence[RunFolder]) -> list[tuple[str, str]]:
    """(task, metric) of all scores, in order."""
    tables = (run.results.get("validation", {}) for run in runs)
    return list(dict.fromkeys((task, m) for table in tables for task, values in table.items() for m in values))


def _scores(runs: Sequence[RunFolder]) -> dict[str, Any]:
    rows: list[list[str]] = []
    best: set[tuple[int, int]] = set()
    for task, metric in _metrics(runs):
        if metric == "items":
            continue
        values = [run.results.get("validation", {}).get(task, {}).get(metric) for run in runs]
        baselines = [run.results.get("baselines", {}).get(task, {}).get(metric) for run in runs]
        there = [value for value in values if value is not None]
        winner = (min if metric in _LOWER_IS_BETTER else max)(there)
        if min(there) < max(there):
            best |= {(len(rows), column) for column, value in enumerate(values, start=1) if value == winner}
        baseline = next((value for value in baselines if value is not None), None)
        shown = (_NONE if value is None else f"{value:.4f}" for value in [*values, baseline])
        rows.append([f"{task}: {metric}", *shown])
    words = (
        "Validation, after the last step; * is the best of a row. One run each: another seed moves a score as well, so "
        "compare several seeds before a small difference is believed. Baseline: one answer for all items."
    )
    return {"rows": rows, "best": best, "words": words}


def arms_of(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Finished runs that differ in nothing but their seeds, by what their feed-forward layers are; where several arms
    have the same, the name of their first run is added."""
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


def _arms(runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Means over seeds; without rows if no arm has several runs."""
    arms = arms_of(runs)
    rows = []
    if any(len(alike) > 1 for alike in arms.values()):
        rows = [["runs", *(str(len(alike)) for alike in arms.values())]]
        rows.append(["parameters", *(f"{alike[0].results['parameters']['total']:,}" for alike in arms.values())])
        for task, metric in _metrics(runs):
            scores = [[run.results["validation"].get(task, {}).get(metric) for run in alike] for alike in arms.values()]
            there = [[value for value in values if value is not None] for values in scores]
            if metric != "items":
                rows.append([f"{task}: {metric}", *map(mean_and_half_width, there)])
    words = "Runs that differ in their seeds alone are one arm: mean ± half of its 95% interval (Student's t)."
    return {"title": "Arms", "header": ["", *arms], "rows": rows, "words": words}


def _parameter_rows(runs: Sequence[RunFolder]) -> list[list[str]]:
    counts = {kind: [run.results.get("parameters", {}).get(kind) for run in runs] for kind in PARAMETERS}
    return [[kind, *(f"{n:,}" if n else _NONE for n in numbers)] for kind, numbers in counts.items() if any(numbers)]


def _settings(runs: Sequence[RunFolder]) -> list[list[str]]:
    rows = []
    for key in dict.fromkeys(key for run in runs for key in run.settings):
        values = [run.settings.get(key) for run in runs]
        if not is_neutral(key) and any(value != values[0] for value in values):
            rows.append([key, *(_NONE if value is None else str(value) for value in values)])
    return rows
