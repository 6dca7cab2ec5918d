"""`mpoe compare RUN_DIR RUN_DIR ...`: training runs side by side, on the terminal and as a report.

It shows parameters, the settings that differ, scores, curves and time. Unfinished runs are shown as far as they got."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mpoe.cli import report
from mpoe.cli.command import Asked, CommandError, as_command, option
from mpoe.cli.evaluate import metrics_of, score_table
from mpoe.cli.models import MODEL_OR_RUN, REPORT_FILE, RESULTS_FILE, check_output, write_json
from mpoe.cli.options import BASELINES
from mpoe.cli.report import Table
from mpoe.training.output_dir import METRICS_FILE, RUN_FILE, flatten, is_neutral, read_metrics, read_record

MOST_RUNS = 12
NUMBERS_FILE = "compare.json"
_NONE = "-"
_SEEDS = ("seed", "data_seed", "gradient_mask_seed")


_SPLITS = ("train", "seen", "validation")
_CURVES = (
    "From metrics.jsonl. Pale lines are the raw values, the others running means; dots are evaluations. Task loss is "
    "in nats per target token, without the balancing loss. Entropy / ln E is 1 where experts get equal shares."
)
_LOAD = (
    "A row for each mixture layer, a column for each expert: the share of the layer's tokens that the router gave it "
    "in the last logged steps. An expert near 0 learns nothing; balance_loss_weight spreads tokens."
)
_DATA = "Items, or blocks of tokens of language modelling. Seen: items of all optimizer steps together."
_RUNS = "Seconds: since a run was last started; per step: between two log lines without an evaluation or a save."
_SCORES = (
    "Validation, after the last step; * is the best of a row. One run each: another seed moves a score as well, so "
    "compare several seeds before a small difference is believed. Baseline: one answer for all items."
)
_ARMS = "Runs that differ in their seeds alone are one arm: mean ± half of its 95% interval (Student's t)."
_SETTINGS = "Settings of run.json that are not the same in all runs and may change what a run computes."


# Kinds of `model.parameter_report()` in the order of reports, and their descriptions.
PARAMETERS = {
    "central": "central cores, shared by the experts of a layer",
    "auxiliary": "auxiliary cores of all experts",
    "expert": "weights of dense experts",
    "router": "routers",
    "rest": "everything else: embeddings, attention, norms, biases, layers that stayed dense",
    "total": "the whole model",
    "trainable": "of the whole model, what trains",
    "dense_total": "for comparison: the model before conversion",
    "switch_total": "for comparison: as many experts with full weights (Switch)",
}


@dataclass
class CompareOptions:
    """Options that only `compare` has."""

    output_dir: str = option("mpoe_compare", "folder for report.html and compare.json")
    overwrite: bool = option(False, "replace the report in the output folder")
    names: list[str] = option([], "what the runs are called, in their order; default: their folders' names")


@as_command("mpoe compare RUN_DIR RUN_DIR ... [--flag value ...]", CompareOptions, words=(1, MOST_RUNS))
def command(asked: Asked) -> None:
    """Compare the runs in the folders; prints tables and writes the report."""
    (options,), paths = asked.options, asked.words
    if len(paths) < 2:
        raise CommandError(f"compare needs two runs or more; got {len(paths)}: mpoe compare RUN_DIR RUN_DIR ...")
    folder = Path(options.output_dir)
    check_output("output_dir", folder, options.overwrite, "an earlier report", [REPORT_FILE], MODEL_OR_RUN)
    if options.names and len(options.names) != len(paths):
        raise CommandError(f"names must be one for each of the {len(paths)} runs; got {len(options.names)}")
    names = options.names or [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [f"{k} {name}" for k, name in enumerate(names, start=1)]
    runs = [read_run(path, name) for path, name in zip(paths, names, strict=True)]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / NUMBERS_FILE, [vars(run) for run in runs])
    for table in write_report(folder / REPORT_FILE, runs):
        table.show(least_width=120)
    print(f"report and numbers are in {folder}; open {folder / REPORT_FILE}")


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        name: its name in comparisons.
        settings: from ``run.json``, by dotted name.
        results: from ``results.json``; empty until the run has finished.
        records: from ``metrics.jsonl``.
    """

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def mixture(self) -> str:
        """A short description of the feed-forward layers; empty if neither results nor settings have it."""
        if self.settings.get("arm.baseline") in BASELINES:
            return BASELINES[self.settings["arm.baseline"]]
        if "mixture" in self.results:
            return str(self.results["mixture"])
        count, shape = self.settings.get("experts.num_experts"), self.settings.get("experts.shape")
        return f"{count} experts, {shape}" if count is not None else ""


def read_run(path: str, name: str = "") -> RunFolder:
    """The run in folder ``path``.

    Raises:
        ValueError: not the folder of a run, or a file in it that cannot be read.
    """
    folder = Path(path)
    record = read_record(folder)
    if record is None:
        raise CommandError(f"{path} is not the folder of a run: it holds no {RUN_FILE}")
    try:
        ended = (folder / RESULTS_FILE).is_file()
        results = dict(json.loads((folder / RESULTS_FILE).read_text())) if ended else {}
        records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} holds a run that cannot be read: {error}") from None
    return RunFolder(name or folder.name or path, dict(flatten(record)), results, records)


def mixture_of(model: Any) -> str:
    """A short description of a model's feed-forward layers."""
    config = getattr(model, "mpoe_config", None)
    if config is None:
        return "dense"
    if config.moe_type == "none":
        return f"no router, modules {', '.join(config.targets)}"
    shape = config.shape if isinstance(config.shape, str) else "own"
    experts = "dense experts" if config.expert_type == "dense" else f"MPO experts, shape {shape}"
    return f"{config.num_experts} {experts}, top-{config.top_k}"


def write_report(file: Path, runs: Sequence[RunFolder]) -> list[Table]:
    """Write the report of runs side by side, or that of one run; returns its tables."""
    (scores, *tables), (one, *others) = _tables(runs), runs
    commands = (Markup("<pre>{}: {}</pre>").format(run.name, run.settings.get("command", _NONE)) for run in runs)
    remarks = (f"{run.name}: {remark}" for run in runs for remark in run.results.get("remarks", ()))
    parts = [*commands, scores.section(), *(Markup('<p class="failed">{}</p>').format(each) for each in remarks)]
    if others:
        title, curves = " / ".join(run.name for run in runs), report.run_curves({run.name: run.records for run in runs})
    else:
        title = f"{one.name}: {one.mixture} after {one.results.get('steps', 0):,} steps"
        curves = report.training_curves(one.records)
    parts.append(report.section("Training", report.picture(curves, "losses and expert load"), note=_CURVES))
    loads = [record["expert_load"]["share"] for record in one.records if record.get("expert_load")]
    if loads and not others:
        names = one.results.get("layers") or list(map(str, range(len(loads[-1]))))
        layers = {name: layer for name, layer in zip(names, loads[-1], strict=False) if layer}
        figure = report.load_map(list(layers.values()), list(layers))
        parts.append(report.section("Expert load", report.picture(figure, "expert load by layer"), note=_LOAD))
    parts += [table.section() for table in tables]
    settings = [(key, *(str(run.settings.get(key, _NONE)) for run in runs)) for key in _settings(runs)]
    more = Markup("<details><summary>All {} settings</summary>{}</details>")
    parts.append(more.format(len(settings), Table(["", *(run.name for run in runs)], settings, kind="text").html()))
    report.write_page(file, title, parts)
    return [scores, *tables]


# -------------------------------------------------- tables: a row for each fact, a column for each run


def _tables(runs: Sequence[RunFolder]) -> list[Table]:
    """Scores come first."""
    header = ["", *(run.name for run in runs)]
    kinds = [key for key in PARAMETERS if any(run.results.get("parameters", {}).get(key) for run in runs)]
    meanings = "; ".join(f"{kind}: {PARAMETERS[kind]}" for kind in kinds)
    arms = arms_of(runs)
    scores = {run.name: run.results.get("validation", {}) for run in runs}
    baselines = {task: own for run in runs for task, own in run.results.get("baselines", {}).items()}
    differ = [
        key for key in _settings(runs) if not is_neutral(key) and len({str(r.settings.get(key)) for r in runs}) > 1
    ]
    data = dict.fromkeys((task, split) for run in runs for task in run.results.get("data", {}) for split in _SPLITS)
    found = [
        Table(["", *arms], _arm_rows(arms, metrics_of(scores.values())), "Arms", _ARMS),
        Table(header, _what(runs), "Runs", _RUNS, "text"),
        Table(header, _rows(runs, data, lambda run, key: run.results["data"][key[0]][key[1]]), "Data", _DATA),
        Table(
            header, _rows(runs, kinds, lambda run, key: run.results["parameters"][key]), "Parameters", f"{meanings}."
        ),
        Table(
            header, _rows(runs, differ, lambda run, key: run.settings[key]), "Settings that differ", _SETTINGS, "text"
        ),
    ]
    return [score_table(scores, baselines, "Scores", _SCORES), *(each for each in found if each.rows)]


def _rows(runs: Sequence[RunFolder], keys: Iterable[Any], read: Callable[[RunFolder, Any], Any]) -> list[list[str]]:
    """A row for each key; runs that do not have it get a dash."""

    def cell(run: RunFolder, key: Any) -> str:
        try:
            value = read(run, key)
        except LookupError:
            value = None
        return f"{value:,}" if type(value) is int else _NONE if value is None else str(value)

    return [[key if isinstance(key, str) else ": ".join(key), *(cell(run, key) for run in runs)] for key in keys]


def _what(runs: Sequence[RunFolder]) -> list[list[str]]:
    """What the runs are, and how they went."""

    def per_step(run: RunFolder) -> str:
        logged = [(a, b) for a, b in itertools.pairwise(run.records) if "loss" in a and "loss" in b]
        times = sorted((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in logged if b["step"] > a["step"])
        return f"{times[len(times) // 2]:.3g}" if times else _NONE

    def ended(run: RunFolder) -> str:
        steps = run.results.get("steps") or max((record.get("step", 0) for record in run.records), default=0)
        return f"{steps:,}" if run.results else f"{steps:,}, not ended"

    def batch(run: RunFolder) -> str:
        own = run.settings.get
        return str(own("training.train_batch_size", 0) * own("training.gradient_accumulation_steps", 1))

    def rate(run: RunFolder) -> str:
        why = run.settings.get("learning_rate_from", "")
        return f"{run.settings.get('training.learning_rate', 0):g}" + (f": {why}" if why and len(runs) == 1 else "")

    rows = {
        "started from": lambda run: str(run.results.get("model") or run.settings.get("model", _NONE)),
        "feed-forward layers": lambda run: run.mixture or _NONE,
        "optimizer steps": ended,
        "items of a step": batch,
        "learning rate": rate,
        "training loss, last logged": lambda run: next(
            (f"{record['loss']:.4f}" for record in reversed(run.records) if record.get("loss") is not None), _NONE
        ),
        "training, seconds": lambda run: f"{run.results['seconds']:.0f}" if run.results else _NONE,
        "seconds per step, median": per_step,
        "device": lambda run: run.results.get("made_with", {}).get("device", _NONE),
    }
    return [[name, *map(tell, runs)] for name, tell in rows.items()]


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
    from scipy.stats import t

    if len(values) < 2:
        return f"{values[0]:.4f}" if values else _NONE
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def _arm_rows(arms: dict[str, list[RunFolder]], metrics: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Means over seeds; none if no arm has several runs."""
    if all(len(alike) < 2 for alike in arms.values()):
        return []
    rows = [["runs", *(str(len(alike)) for alike in arms.values())]]
    rows.append(["parameters", *(f"{alike[0].results['parameters']['total']:,}" for alike in arms.values())])
    for task, metric in metrics:
        scores = [[run.results["validation"].get(task, {}).get(metric) for run in alike] for alike in arms.values()]
        there = [[value for value in values if value is not None] for values in scores]
        rows.append([f"{task}: {metric}", *map(mean_and_half_width, there)])
    return rows


def _settings(runs: Sequence[RunFolder]) -> list[str]:
    """Names of all settings of the runs, in order."""
    return sorted({key for run in runs for key in run.settings} - {"command"})
