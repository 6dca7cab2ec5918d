"""``report.html`` of a training run: settings, results, and the meaning of every column."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpoe.cli import plots
from mpoe.cli.html import Rows, facts, figures, note, table, write_page
from mpoe.cli.run_folder import PARAMETERS, RunFolder
from mpoe.cli.scoring import SCORE_NOTE

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


def parameter_rows(parameters: dict[str, int]) -> list[tuple[str, str, str]]:
    """Kind, number and meaning of each entry of a parameter report, without kinds that the model lacks."""
    return [(kind, f"{count:,}", PARAMETERS.get(kind, "")) for kind, count in parameters.items() if count]


def _curves(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    for paint in plots.training_panels(records):
        yield plots.draw(paint, *plots.PANEL)


def _load(run: RunFolder) -> list[str]:
    """The heat map of the last logged expert load, with the layers' names."""
    import mpoe.plotting as plotting

    loads = [record["expert_load"]["share"] for record in run.records if record.get("expert_load")]
    if not loads or not plotting.have_matplotlib():
        return []
    names = run.results.get("layers") or list(map(str, range(len(loads[-1]))))
    shown = [(name, layer) for name, layer in zip(names, loads[-1], strict=False) if layer]
    drawing = plots.load_map([layer for _, layer in shown], "Expert load", [name for name, _ in shown])
    kind = "wide" if len(shown[0][1]) > 8 else ""  # only few experts fit on a phone
    return ["<h2>Expert load</h2>", note(_LOAD), f'<figure class="{kind}">{drawing}</figure>']


def _settings(run: RunFolder, given: frozenset[str]) -> list[str]:
    """The given settings, and all settings."""
    above = ("command", "learning_rate_from")
    rows = [(name, _shown(value)) for name, value in sorted(run.settings.items()) if name not in above]
    shown = {*given, "train_batch_size"}  # the global one, by which a run is kept in its record
    own = [row for row in rows if row[0].rpartition(".")[2] in shown]
    hidden = table(("setting", "value"), rows, "text")
    return [
        "<h2>Settings</h2>",
        note("The batch size, and what the command or its file named; every other one, with its value here, is below."),
        table(("setting", "value"), own, "text"),
        f"<details><summary>All {len(rows)} settings</summary>{hidden}</details>",
    ]


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)


def _facts(run: RunFolder) -> Rows:
    results, settings = run.results, run.settings
    batch = settings.get("training.train_batch_size", 0) * settings.get("training.gradient_accumulation_steps", 1)
    steps, seconds = results["steps"], results["seconds"]
    yield "started from", str(results["model"])
    yield "class", results["class"]
    yield "feed-forward layers", run.mixture
    yield "learning rate", f"{settings['training.learning_rate']:g}: {settings.get('learning_rate_from', 'as given')}"
    yield "length", f"{steps:,} optimizer steps of {batch} items"
    yield "time", f"{seconds:.0f} seconds of training since it was last started"
    yield "made with", ", ".join(f"{name} {version}" for name, version in results.get("made_with", {}).items())


def write_run_report(file: Path, run: RunFolder, header: Sequence[str], rows: Rows, given: frozenset[str]) -> None:
    """Write the report of a training run.

    Args:
        file: where to.
        run: a finished run.
        header, rows: the scores as shown on the terminal.
        given: names of the options that were set.
    """
    results = run.results
    data = [(task, *(f"{counts.get(s, 0):,}" for s in _SPLITS)) for task, counts in results.get("data", {}).items()]
    title = f"{run.name}: {run.mixture} after {results['steps']:,} steps"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<pre>{html.escape(str(run.settings.get('command', '')))}</pre>",
        facts(_facts(run)),
        "<h2>Validation</h2>",
        table(header, rows, "scores"),
        note(SCORE_NOTE),
        *(f'<p class="failed">{html.escape(remark)}</p>' for remark in results.get("remarks", ())),
        "<h2>Training</h2>",
        figures(lambda: _curves(run.records)),
        note(_CURVES),
        *_load(run),
        "<h2>Data</h2>",
        table(("task", *_SPLITS), data),
        note(_DATA),
        "<h2>Parameters</h2>",
        table(("kind", "parameters", "what they are"), parameter_rows(results["parameters"]), "last"),
        *_settings(run, given),
    ]
    write_page(file, f"mpoe run: {run.name}", parts)
