"""Training runs read from their folders: settings, logs and results; the report of one; its data for other commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.files import RESULTS_FILE
from mpoe.cli.options import BASELINES
from mpoe.cli.tasks import DataOptions
from mpoe.training.metrics_file import METRICS_FILE, read_metrics
from mpoe.training.output_dir import RUN_FILE, flatten

if TYPE_CHECKING:
    from mpoe.data.spec import TaskSpec

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
SOURCES = {"data_dir", "tasks", "task_file", "eval_tasks"}  # options that select the items


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
        CommandError: not the folder of a run, or a file in it that cannot be read.
    """
    folder = Path(path)
    if not (folder / RUN_FILE).is_file():
        raise CommandError(f"{path} is not the folder of a run: it holds no {RUN_FILE}")
    try:
        settings = dict(flatten(json.loads((folder / RUN_FILE).read_text())["config"]))
        ended = (folder / RESULTS_FILE).is_file()
        results = dict(json.loads((folder / RESULTS_FILE).read_text())) if ended else {}
        records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} holds a run that cannot be read: {error}") from None
    return RunFolder(name or folder.name or path, settings, results, records)


def mixture_of(model: Any) -> str:
    """A short description of a model's feed-forward layers."""
    config = getattr(model, "mpoe_config", None)
    if config is None:
        return "dense"
    if config.moe_type == "none":
        return f"no router, modules {', '.join(config.targets)}"
    if config.expert_type == "dense":
        experts = "dense experts"
    else:
        experts = f"MPO experts, shape {config.shape if isinstance(config.shape, str) else 'own'}"
    return f"{config.num_experts} {experts}, top-{config.top_k}"


# -------------------------------------------------------------- for commands that look at a run's model


def data_of_run(
    model_dir: str, data: DataOptions, flags: set[str]
) -> tuple[DataOptions, int, dict[str, TaskSpec] | None]:
    """Data options as in the run whose model or checkpoint is in ``model_dir``, unless a flag says otherwise: lengths,
    columns, label words, and the items if no flag selects any.

    Returns:
        The options, the seed that split and drew the run's items (0 without a run; with another one,
        split_validation_test would test on items that the run validated on), and the tasks that its ``task_file``
        described at that time (None: none, or another file is given).

    Raises:
        CommandError: ``run.json`` cannot be read.
    """
    places = (folder / RUN_FILE for folder in (Path(model_dir), Path(model_dir).resolve().parent))
    file = next(filter(Path.is_file, places), None)
    try:
        run = {} if file is None else dict(json.loads(file.read_text())["config"])
    except (ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{file} does not describe a run: {error}") from None
    kept = run.get("data", {})
    names = {f.name for f in fields(DataOptions) if f.name not in flags} & set(kept)
    if flags & SOURCES:
        names -= SOURCES
    taken = {name: kept[name] for name in sorted(names) if kept[name] != getattr(data, name)}
    if taken:
        print("as in training: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    training = run.get("training", {})
    seed = training.get("seed", 0) if training.get("data_seed") is None else training["data_seed"]
    data = replace(data, **taken) if taken else data
    return data, int(seed), None if "task_file" in flags else _descriptions(run)


def _descriptions(run: dict[str, Any]) -> dict[str, TaskSpec] | None:
    """The tasks of the run's ``task_file`` at that time; None if the run saved none."""
    from mpoe.data.spec import TaskSpec

    kept = run.get("described")
    try:
        return {name: TaskSpec.from_mapping(name, values) for name, values in kept.items()} if kept else None
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"described in run.json does not describe tasks: {error}") from None


# ------------------------------------------------------------------------ the report of a run

_CURVES = (
    "From metrics.jsonl. Pale lines are the raw values, the others running means; dots are evaluations. Task loss is "
    "in nats per target token, without the balancing loss. Entropy / ln E is 1 where experts get equal shares."
)
_LOAD = (
    "A row for each mixture layer, a column for each expert: the share of the layer's tokens that the router gave it "
    "in the last logged steps. An expert near 0 learns nothing; balance_loss_weight spreads tokens."
)
_SPLITS = ("train", "seen", "validation")
_DATA = "Items, or blocks of tokens of language modelling. Seen: items of all optimizer steps together."
_SETTINGS = "The batch size, and what the command or its file named; every other one, with its value here, is below."


def write_run_report(file: Path, run: RunFolder, scores: Any, given: frozenset[str]) -> None:
    """Write the report of a finished run.

    Args:
        file: where to.
        run: the run.
        scores: the `mpoe.cli.report.Table` of its scores.
        given: names of the options that were set.
    """
    from markupsafe import Markup

    from mpoe.cli import plots
    from mpoe.cli.report import Table, facts, figures, note, write_page

    results = run.results
    data = [(task, *(f"{counts.get(s, 0):,}" for s in _SPLITS)) for task, counts in results.get("data", {}).items()]
    sizes = [(kind, f"{n:,}", PARAMETERS.get(kind, "")) for kind, n in results["parameters"].items() if n]
    above = ("command", "learning_rate_from")
    rows = [(n, "-" if v is None else str(v)) for n, v in sorted(run.settings.items()) if n not in above]
    shown = {*given, "train_batch_size"}  # the global one, by which a run is kept in its record
    own = Table(
        ("setting", "value"), [r for r in rows if r[0].rpartition(".")[2] in shown], "Settings", _SETTINGS, "text"
    )
    more = Markup("<details><summary>All {} settings</summary>{}</details>")
    title = Markup("<h1>{}: {} after {:,} steps</h1>").format(run.name, run.mixture, results["steps"])
    parts = [
        title,
        Markup("<pre>{}</pre>").format(run.settings.get("command", "")),
        facts(_facts(run)),
        scores.section(),
        *(Markup('<p class="failed">{}</p>').format(remark) for remark in results.get("remarks", ())),
        Markup("<h2>Training</h2>"),
        figures(lambda: (plots.svg(paint, *plots.PANEL) for paint in plots.training_panels(run.records))),
        note(_CURVES),
        *_load(run),
        Table(("task", *_SPLITS), data, "Data", _DATA).section(),
        Table(("kind", "parameters", "what they are"), sizes, "Parameters", kind="last").section(),
        own.section(),
        more.format(len(rows), Table(("setting", "value"), rows, kind="text").html()),
    ]
    write_page(file, f"mpoe run: {run.name}", parts)


def _load(run: RunFolder) -> list[Any]:
    """The heat map of the last logged expert load, with the layers' names."""
    from markupsafe import Markup

    from mpoe.cli import plots
    from mpoe.cli.report import note

    loads = [record["expert_load"]["share"] for record in run.records if record.get("expert_load")]
    if not loads or not plots.have_matplotlib():
        return []
    names = run.results.get("layers") or list(map(str, range(len(loads[-1]))))
    shown = {name: layer for name, layer in zip(names, loads[-1], strict=False) if layer}
    experts = len(next(iter(shown.values())))
    drawing = plots.svg(
        plots.load_map(list(shown.values()), list(shown)), min(8.0, 1.8 + 0.36 * experts), 1.4 + 0.28 * len(shown)
    )
    kind = "wide" if experts > 8 else ""  # only few experts fit on a phone
    figure = Markup('<figure class="{}">{}</figure>').format(kind, Markup(drawing))
    return [Markup("<h2>Expert load</h2>"), note(_LOAD), figure]


def _facts(run: RunFolder) -> Iterator[Sequence[str]]:
    results, settings = run.results, run.settings
    batch = settings.get("training.train_batch_size", 0) * settings.get("training.gradient_accumulation_steps", 1)
    yield "started from", str(results["model"])
    yield "class", results["class"]
    yield "feed-forward layers", run.mixture
    yield "learning rate", f"{settings['training.learning_rate']:g}: {settings.get('learning_rate_from', 'as given')}"
    yield "length", f"{results['steps']:,} optimizer steps of {batch} items"
    yield "time", f"{results['seconds']:.0f} seconds of training since it was last started"
    yield "made with", ", ".join(f"{name} {version}" for name, version in results.get("made_with", {}).items())
