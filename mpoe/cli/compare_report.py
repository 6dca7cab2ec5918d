"""The comparison of runs on the terminal and as ``report.html``."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mpoe.cli import plots
from mpoe.cli.comparison import Comparison
from mpoe.cli.html import figures, note, table, write_page
from mpoe.cli.run_folder import RunFolder


def show(tables: Sequence[Comparison]) -> None:
    """Print the tables; a star marks the best value of a row, because a pipe has no colours."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:  # the width is unknown, so rows are not cut
        console = Console(width=max(console.width, 120))
    for found in tables:
        drawn = Table(*map(escape, found.header), title=found.title)
        for r, row in enumerate(found.rows):
            drawn.add_row(*(Text(_marked(cell, (r, c) in found.best)) for c, cell in enumerate(row)))
        console.print(drawn)
        console.print(Text(found.words, style="dim"))


def _marked(cell: str, best: bool) -> str:
    return f"{cell} *" if best else cell


def write_comparison(file: Path, runs: Sequence[RunFolder], tables: Sequence[Comparison]) -> None:
    """Write the report.

    Args:
        file: output file.
        runs: the compared runs.
        tables: from `mpoe.cli.comparison.compare`.
    """
    first, *others = tables
    parts = [f"<h1>{html.escape(' / '.join(run.name for run in runs))}</h1>", *_section(first)]
    parts += ["<h2>Curves</h2>", figures(lambda: _drawings(runs))]
    parts.append(note("Pale lines are the raw values, the others running means; dots are evaluations."))
    for found in others:
        parts += _section(found)
    commands = [f"{run.name}: {run.settings['command']}" for run in runs if run.settings.get("command")]
    if commands:
        parts += ["<h2>Commands</h2>", *(f"<pre>{html.escape(line)}</pre>" for line in commands)]
    write_page(file, "mpoe compare", parts)


def _section(found: Comparison) -> list[str]:
    rows = [[_marked(cell, (r, c) in found.best) for c, cell in enumerate(row)] for r, row in enumerate(found.rows)]
    return [f"<h2>{html.escape(found.title)}</h2>", table(found.header, rows, "runs", found.best), note(found.words)]


def _drawings(runs: Sequence[RunFolder]) -> Iterator[str]:
    def curve(run: RunFolder, key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in run.records if r.get(key) is not None]

    training = {run.name: curve(run, "task_loss") or curve(run, "loss") for run in runs}
    yield plots.loss_curves(training, "Training: task loss", size=plots.PANEL)
    validation: dict[str, Any] = {}
    for run in runs:
        for task, points in plots.validation_losses(run.records).items():
            validation[run.name if task == "validation" else f"{run.name}, {task}"] = points
    if validation:
        yield plots.loss_curves(validation, "Validation loss", smoothed=False, size=plots.PANEL)
    sizes = {run.name: run.results["parameters"] for run in runs if run.results.get("parameters")}
    if sizes:
        yield plots.size_bars(sizes)
