"""`mpoe compare RUN_DIR RUN_DIR ...`: training runs side by side, on the terminal and as a report.

It shows parameters, the settings that differ, scores, curves and time. Unfinished runs are shown as
far as they got."""

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mpoe.cli import report
from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.cli.evaluate import metrics_of, score_table
from mpoe.cli.options import BASELINES
from mpoe.cli.outputs import REPORT_FILE, RESULTS_FILE, check_output, write_json
from mpoe.cli.report import Table
from mpoe.data.mappings import flatten
from mpoe.training.output_dir import METRICS_FILE, RUN_FILE, is_neutral, read_metrics, read_record

MOST_RUNS = 12
NUMBERS_FILE = "compare.json"
_SEEDS = ("seed", "data_seed", "gradient_mask_seed")
_CURVES = (
    "From metrics.jsonl: a dot for each logged step or evaluation. Task loss is in nats per target "
    "token, without the balancing loss. Entropy / ln E is 1 where experts get equal shares."
)
_LOAD = (
    "A row for each mixture layer, a column for each expert: the share of the layer's tokens that "
    "the router gave it in the last logged steps. An expert near 0 learns nothing; "
    "balance_loss_weight spreads tokens."
)
_SCORES = (
    "Validation, after the last step; * is the best of a row. Another seed moves a score as well, "
    "so compare several before a small difference is believed. Constant: one answer for all items."
)
_ARMS = (
    "Runs that differ in their seeds alone are one arm: mean ± half of its 95% interval (Student's "
    "t). Less the first arm's: over runs of the same seed; a difference whose interval holds 0 is "
    "not shown to be one."
)
# Tables with a column for each run -> how to read them.
_WORDS = {
    "Runs": "Seconds: since a run was last started; per step: between two log lines without an "
    "evaluation or a save.",
    "Data": "Items, or blocks of tokens of language modelling. Seen: items of all optimizer steps "
    "together.",
    "Parameters": (
        "central: shared by the experts of a layer; auxiliary: cores of all experts; expert: "
        "weights of dense experts; rest: embeddings, attention, norms, biases, layers that stayed "
        "dense; dense_total: the model before conversion; switch_total: as many experts with full "
        "weights (Switch)."
    ),
    "Settings that differ": "Those of run.json that are not the same in all runs and may change "
    "what a run computes.",
}


@dataclass
class CompareOptions:
    """Options that only `compare` has."""

    output_dir: Path = option(Path("mpoe_compare"), "folder for report.html and compare.json")
    overwrite: bool = option(False, "replace the report in the output folder")


@as_command(CompareOptions, words=(2, MOST_RUNS))
def command(request: Request) -> None:
    """Compare the runs in the folders; prints tables and writes the report."""
    (options,), paths = request.options, request.words
    folder = options.output_dir
    check_output("output_dir", folder, options.overwrite, "an earlier report", [REPORT_FILE])
    names = [Path(path).resolve().name for path in paths]
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
    settings: dict
    results: dict
    records: list[dict]

    @property
    def seeds(self) -> dict:
        """The settings that are seeds, by dotted name."""
        return {
            name: value
            for name, value in self.settings.items()
            if name.rpartition(".")[2] in _SEEDS
        }

    @property
    def mixture(self) -> str:
        """A short description of the feed-forward layers; empty if neither results nor settings
        have it."""
        if self.settings.get("arm.baseline") in BASELINES:
            return BASELINES[self.settings["arm.baseline"]]
        if "mixture" in self.results:
            return str(self.results["mixture"])
        count = self.settings.get("experts.num_experts")
        shape = self.settings.get("experts.shape")
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
    scores, *tables = _tables(runs)
    one, *others = runs
    parts = []
    for run in runs:
        command_line = run.settings.get("command", "-")
        parts.append(Markup("<pre>{}: {}</pre>").format(run.name, command_line))
    parts.append(scores.section())
    for run in runs:
        for remark in run.results.get("remarks", ()):
            parts.append(Markup('<p class="failed">{}: {}</p>').format(run.name, remark))
    curves = report.curves({run.name: run.records for run in runs})
    parts.append(report.section("Training", curves, note=_CURVES))
    title = " / ".join(run.name for run in runs)
    if not others:
        title += f": {one.mixture} after {one.results.get('steps', 0):,} steps"
        load: list = next(
            (r["expert_load"]["share"] for r in reversed(one.records) if r.get("expert_load")), []
        )
        names = one.results.get("layers") or list(map(str, range(len(load))))
        layers = {name: layer for name, layer in zip(names, load, strict=False) if layer}
        if layers:
            figure = report.load_map(list(layers.values()), list(layers))
            parts.append(report.section("Expert load", figure, note=_LOAD))
    parts += [table.section() for table in tables]
    settings = _side_by_side("", runs, [dict(sorted(run.settings.items())) for run in runs])
    more = Markup("<details><summary>All settings</summary>{}</details>")
    report.write_page(file, title, [*parts, more.format(settings.html())])
    return [scores, *tables]


# -------------------------------------------------- tables: a row for each fact, a column for each
# run


def _side_by_side(title: str, runs: Sequence[RunFolder], facts: Sequence[Mapping]) -> Table:
    """A row for each fact; runs that do not have it get a dash."""

    def cell(value: Any) -> str:
        return f"{value:,}" if type(value) is int else "-" if value is None else str(value)

    names = dict.fromkeys(name for values in facts for name in values)
    rows = [[name, *(cell(values.get(name)) for values in facts)] for name in names]
    kind = "" if title in ("Data", "Parameters") else "text"
    return Table(["", *(run.name for run in runs)], rows, title, _WORDS.get(title, ""), kind)


def _tables(runs: Sequence[RunFolder]) -> list[Table]:
    """Scores come first."""
    scores = {run.name: run.results.get("validation", {}) for run in runs}
    constants = {
        task: score for run in runs for task, score in run.results.get("constant", {}).items()
    }
    arms = arms_of(runs)
    tables = [Table(["", *arms], _arm_rows(arms, metrics_of(scores.values())), "Arms", _ARMS)]
    every = [_facts(run, len(runs) == 1) for run in runs]
    tables += [_side_by_side(title, runs, [facts[title] for facts in every]) for title in every[0]]
    names = sorted({name for run in runs for name in run.settings if not is_neutral(name)})
    differ = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    settings = [{name: run.settings.get(name) for name in differ} for run in runs]
    tables.append(_side_by_side("Settings that differ", runs, settings))
    first = score_table(scores, constants, "Scores", _SCORES)
    return [first] + [table for table in tables if table.rows]


def _facts(run: RunFolder, alone: bool) -> dict[str, dict]:
    """By table: what the run is, and how it went."""
    setting = run.settings.get
    results = run.results
    records = run.records
    logged = [
        (a, b)
        for a, b in itertools.pairwise(records)
        if "loss" in a and "loss" in b and b["step"] > a["step"]
    ]
    times = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in logged]
    losses = [
        record.get("task_loss", record["loss"])
        for record in records
        if record.get("loss") is not None
    ]
    steps = results.get("steps") or max((record.get("step", 0) for record in records), default=0)
    why = setting("learning_rate_from", "") if alone else ""
    runs = {
        "started from": results.get("model") or setting("model"),
        "feed-forward layers": run.mixture or None,
        "optimizer steps": f"{steps:,}" if results else f"{steps:,}, not ended",
        "items of a step": setting("training.train_batch_size", 0)
        * setting("training.gradient_accumulation_steps", 1),
        "learning rate": f"{setting('training.learning_rate', 0):g}" + (f": {why}" if why else ""),
        "training loss, last logged": f"{losses[-1]:.4f}" if losses else None,
        "training, seconds": f"{results['seconds']:.0f}" if results else None,
        "seconds per step, median": f"{statistics.median_high(times):.3g}" if times else None,
        "device": results.get("made_with", {}).get("device"),
    }
    data = {
        f"{task}: {split}": n
        for task, sizes in results.get("data", {}).items()
        for split, n in sizes.items()
    }
    return {
        "Runs": runs,
        "Data": data,
        "Parameters": {k: n for k, n in results.get("parameters", {}).items() if n},
    }


def arms_of(runs: Sequence[RunFolder]) -> dict[str, list[RunFolder]]:
    """Finished runs that differ in nothing but their seeds, by what their feed-forward layers are;
    where several arms have the same, the name of their first run is added."""
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        settings = {
            name: str(value)
            for name, value in run.settings.items()
            if not is_neutral(name) and name not in run.seeds
        }
        if run.results:
            groups.setdefault(repr(sorted(settings.items())), []).append(run)
    kinds = [alike[0].mixture for alike in groups.values()]
    return {
        kind if kinds.count(kind) == 1 else f"{kind} ({alike[0].name})": alike
        for kind, alike in zip(kinds, groups.values(), strict=True)
    }


def mean_and_half_width(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95% interval (Student's t) if there are several
    values."""
    from scipy.stats import sem, t

    if len(values) < 2:
        return f"{values[0]:.4f}" if values else "-"
    half = t.ppf(0.975, len(values) - 1) * sem(values)
    return f"{statistics.fmean(values):.4f} ± {half:.4f}"


def _differences(
    by_run: Sequence[tuple[dict, float]], first: Sequence[tuple[dict, float]]
) -> list[float]:
    """Scores less those of the first arm's runs with the same seeds; no run counts twice."""
    left = list(first)
    differences = []
    for seeds, score in by_run:
        partners = [partner for partner in left if partner[0] == seeds]
        if partners:
            left.remove(partners[0])
            differences.append(score - partners[0][1])
    return differences


def _arm_rows(
    arms: dict[str, list[RunFolder]], metrics: Sequence[tuple[str, str]]
) -> list[list[str]]:
    """Means over seeds; none if no arm has several runs."""
    if all(len(alike) < 2 for alike in arms.values()):
        return []
    totals = [alike[0].results["parameters"]["total"] for alike in arms.values()]
    rows = [
        ["runs", *(str(len(alike)) for alike in arms.values())],
        ["parameters", *(f"{total:,}" for total in totals)],
    ]
    for task, metric in metrics:
        scores = []  # of every arm: (seeds, score) of its runs
        for alike in arms.values():
            by_run = [
                (run.seeds, run.results["validation"].get(task, {}).get(metric)) for run in alike
            ]
            scores.append([(seeds, score) for seeds, score in by_run if score is not None])
        cells = [mean_and_half_width([score for _, score in by_run]) for by_run in scores]
        rows.append([f"{task}: {metric}", *cells])
        less = [_differences(by_run, scores[0]) for by_run in scores[1:]]
        if less:
            rows.append(
                [f"{task}: {metric}, less the first arm's", "", *map(mean_and_half_width, less)]
            )
    return rows
