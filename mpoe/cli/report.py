"""Tables on the terminal and in HTML, plots, and the one style of all reports: a report is one
self-contained file."""

from __future__ import annotations

import base64
import colorsys
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jinja2 import Environment
from markupsafe import Markup
from rich.console import Console
from rich.table import Table as Drawn
from rich.text import Text

from mpoe.models.weight_files import write_text

if TYPE_CHECKING:
    from mpoe.inspection import BondSpectrum, Route

# Tables and figures scroll inside their box, so the page itself never scrolls sideways on a phone.
_STYLE = """
:root { --soft: #555; --line: #ddd; --accent: #0072B2; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, p, code { overflow-wrap: anywhere; } h1 { font-size: 1.6rem; line-height: 1.25; }
h2 { margin-top: 2.2rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; font-size: 1.25rem; }
.scroll, figure { overflow-x: auto; margin: 1rem 0; } img { max-width: 100%; }
table { border-collapse: collapse; } th { font-weight: 600; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: right; }
td:first-child, th:first-child, .text td, .text th { text-align: left; }
.text td:last-child { overflow-wrap: anywhere; }
.best { white-space: nowrap; font-weight: 600; background: #e3f4e6; }
.routes td { padding: .12rem .3rem; text-align: center; white-space: pre; border: 1px solid #fff; }
.routes th { padding: .12rem .5rem; font-weight: 400; text-align: left; white-space: nowrap; color: var(--soft); }
.legend span, .tokens span { padding: 0 .25em; }
.tokens span { padding: .1em 0; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.9; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: .25rem .7rem; align-items: center; }
.bars b { display: inline-block; height: 1em; background: var(--accent); vertical-align: middle; margin-right: .4em; }
.bars div:nth-of-type(even) b { background: #E69F00; }
pre { background: #f5f5f5; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.failed { padding: .6rem 1rem; background: #fbe5e1; } .note { color: var(--soft); font-size: .93em; }
summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) { body { font-size: 14px; } img { max-width: none; width: 640px; } }
@media print { .scroll, figure { overflow: visible; } tr, figure, pre { break-inside: avoid; } }
"""
_HTML = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_TABLE = _HTML.from_string("""
<div class="scroll"><table class="{{ kind }}">
{% if header|select|list %}
<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
{% endif %}
<tbody>
{% for row in rows %}{% set place = loop.index0 %}
<tr>
{% for cell in row %}<td{% if (place, loop.index0) in best %} class=best{% endif %}>{{ cell }}</td>{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
""")
_LEGEND = """
<p class="legend">Experts:
{% for name in names[:64] %}
<span style="background:{{ colours[loop.index0] }}">{{ name }}</span>
{% endfor %}
</p>
"""
_ROUTES = _HTML.from_string(
    _LEGEND
    + """
{% for text, routes in texts %}
<p><b>{{ text }}</b></p>
{% for route in routes %}
<p>{{ "" if route.stream == "main" else route.stream }} tokens</p>
<div class="scroll"><table class="routes">
<tr><th></th>{% for token in route.tokens %}<td>{{ token }}</td>{% endfor %}</tr>
{% for layer in route.layers %}{% set row = loop.index0 %}
<tr><th>{{ short(layer) }}</th>
{% for chosen in route.experts[row] %}{% set p = route.probabilities[row][loop.index0] %}
<td style="background:{{ colours[chosen[0]] }}" title="
{%- for expert in chosen %}{{ ", " if loop.index0 }}expert {{ expert }}: p = {{ "%.2f"|format(p[loop.index0]) }}{% endfor %}
">{{ chosen|join("+") }}</td>
{% endfor %}
</tr>
{% endfor %}
</table></div>
{% endfor %}
{% endfor %}
"""
)
_TOKENS = _HTML.from_string(
    _LEGEND
    + """
{% for text, tokens in texts.items() %}
<p class="tokens"><b>{{ text }}</b><br>
{% for token, expert in tokens %}<span style="background:{{ colours[expert] }}" title="{{ names[expert] }}">{{ token }}</span>{% endfor %}
</p>
{% endfor %}
"""
)
_BARS = _HTML.from_string("""
<div class="bars">
{% for label, value in bars %}
<span>{{ label }}</span>
<div><b style="width:{{ (70 * [value, 0]|max / most)|round(1) }}%"></b>{{ "%.3f"|format(value) }}</div>
{% endfor %}
</div>
""")
_PAGE = _HTML.from_string("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title>
<style>{{ style }}</style></head>
<body><h1>{{ title }}</h1>{% for part in parts %}{{ part }}{% endfor %}
</body></html>
""")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: names of the columns; empty, the first column names the rows.
        rows: the cells.
        title: heading.
        words: how to read it.
        kind: ``text`` is left-aligned; otherwise all columns but the first are numbers.
        best: (row, column) of highlighted cells; a star marks them, because a pipe has no colours.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    words: str = ""
    kind: str = ""
    best: Collection[tuple[int, int]] = ()

    def _marked(self) -> list[list[str]]:
        return [
            [f"{cell} *" if (r, c) in self.best else cell for c, cell in enumerate(row)]
            for r, row in enumerate(self.rows)
        ]

    def show(self, least_width: int = 0) -> None:
        """Print it, at least ``least_width`` wide where the width is unknown, as in a pipe; then
        how to read it."""
        console = Console()
        if not console.is_terminal and least_width:
            console = Console(width=max(console.width, least_width))
        drawn = Drawn(title=Text(self.title) if self.title else None, show_header=any(self.header))
        for place, name in enumerate(self.header):
            is_number = place and self.kind != "text"
            drawn.add_column(Text(name), justify="right" if is_number else "left")
        for row in self._marked():
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        if self.words:
            console.print(Text(self.words, style="dim"))

    def html(self) -> Markup:
        """The table alone."""
        rows = self._marked()
        html = _TABLE.render(header=self.header, rows=rows, kind=self.kind, best=set(self.best))
        return Markup(html)

    def section(self) -> Markup:
        """The table under its title, with how to read it."""
        return section(self.title, self.html(), note=self.words)


def section(title: str, *parts: Any, note: str = "") -> Markup:
    """``parts``, `Markup`, texts or figures of matplotlib, under a heading; ``note`` explains
    them."""
    image = Markup('<figure><img alt="{}" src="data:image/png;base64,{}"></figure>')
    shown = []
    for part in parts:
        if hasattr(part, "savefig"):
            part = image.format(title, base64.b64encode(png(part)).decode())
        shown.append(part)
    below = Markup('<p class="note">{}</p>').format(note) if note else ""
    return Markup("<h2>{}</h2>{}{}").format(title, Markup("").join(shown), below)


def write_page(file: Path, title: str, parts: Iterable) -> None:
    """Write a page of ``parts``, `Markup` or texts, under its title."""
    write_text(file, _PAGE.render(title=title, style=Markup(_STYLE), parts=list(parts)))


def expert_colours(num_experts: int) -> list[str]:
    """Light backgrounds for black text; consecutive experts have very different hues."""
    colours = []
    for expert in range(num_experts):
        hue = (expert * 0.618034) % 1.0 if num_experts > 12 else expert / num_experts
        rgb = colorsys.hls_to_rgb(hue, (0.78, 0.86)[expert % 2], 0.75)
        colours.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return colours


def routes_html(texts: Sequence[tuple[str, Sequence[Route]]], names: Sequence[str]) -> Markup:
    """Which expert took which token: a column for each token, a row for each layer; ``names`` of
    the experts."""
    from mpoe.models.walk import short_name

    colours = expert_colours(len(names))
    return Markup(_ROUTES.render(texts=texts, names=names, colours=colours, short=short_name))


def tokens_html(texts: Mapping[str, Sequence[tuple[str, int]]], names: Sequence[str]) -> Markup:
    """Texts by name as running tokens, each (token, expert) in its expert's colour."""
    return Markup(_TOKENS.render(texts=texts, names=names, colours=expert_colours(len(names))))


def bars_html(bars: Sequence[tuple[str, float]]) -> Markup:
    """Labelled numbers as bars in two alternating colours; one below 0 has no length."""
    most = max(max(value for _, value in bars), 1e-9)
    return Markup(_BARS.render(bars=bars, most=most))


# ----------------------------------------------------------------- plots, as figures of matplotlib

# Told apart by colour-blind readers too (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
_READABLE = 20  # columns up to which cells of a heat map carry their number

Records = Sequence[Mapping]  # of a run's ``metrics.jsonl``
# A spectrum per name of a weight, grouped by the projections' kind.
Spectra = Mapping[str, Mapping[str, Sequence["BondSpectrum"]]]


def _new(panels: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure, and the axes of its panels, each of so many inches."""
    from matplotlib.figure import Figure

    columns = max(1, min(columns, panels))
    rows = max(1, -(-panels // columns))
    figure = Figure(figsize=(width * columns, height * rows), dpi=144, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[panels:]:
        axes.set_axis_off()
    return figure, grid


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


_TRAINING = "Training: task loss"
_OF_ONE_RUN = {  # panel -> line -> key of a record
    "Balancing loss": {"weighted, all layers": "aux_loss"},
    "Expert load": {
        "entropy / ln E, mean over layers": "expert_entropy",
        "largest share, worst layer": "expert_max_share",
        "smallest share, worst layer": "expert_min_share",
    },
}


def curves(runs: Mapping[str, Records]) -> Any:
    """Training and validation losses of runs by name, side by side; of a single run also its
    balancing loss and expert load."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run, records in runs.items():
        task_loss = "task_loss" if any("task_loss" in record for record in records) else "loss"
        keys: dict[str, dict[str, str]] = {_TRAINING: {"": task_loss}, "Validation loss": {}}
        keys |= _OF_ONE_RUN if len(runs) == 1 else {}
        for key in dict.fromkeys(key for record in records for key in record):
            if key.startswith("eval_") and key.endswith("loss"):
                label = key.removeprefix("eval_").removesuffix("loss").strip("_")
                keys["Validation loss"][label] = key
        logged = [record for record in records if "step" in record]
        for panel, lines in keys.items():
            for label, key in lines.items():
                line = [(r["step"], r[key]) for r in logged if r.get(key) is not None]
                name = ", ".join(filter(None, (run if len(runs) > 1 else "", label))) or "all tasks"
                if line:
                    panels.setdefault(panel, {})[name] = line
    figure, grid = _new(len(panels), 2, 4.6, 3.2)
    for axes, (panel, drawn) in zip(grid, panels.items(), strict=False):
        axes.set_prop_cycle(color=COLOURS)
        for name, points in drawn.items():
            axes.plot(*zip(*points, strict=True), label=name, marker=".", linewidth=0.8)
        axes.set(xlabel="optimizer step", title=panel)
        if panel == "Expert load":
            axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8)
    return figure


def load_map(load: Sequence[Sequence[float]], names: Sequence[str]) -> Any:
    """Share of its tokens that each layer of ``names`` gave to each expert, ``load [layers][E]``,
    in per cent: a row for each layer, with numbers where they can be read."""
    shares = [[100 * count / (sum(layer) or 1.0) for count in layer] for layer in load]
    experts = len(shares[0])
    figure, (axes,) = _new(1, 1, 8.0, 1.4 + 0.28 * len(load))
    high = max(map(max, shares))
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0.0, vmax=high)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for row, line in enumerate(shares if experts <= _READABLE else []):
        for column, share in enumerate(line):
            colour = "white" if share > 0.6 * high else "black"
            axes.text(column, row, f"{share:.0f}", color=colour, **style)
    figure.colorbar(image, ax=axes, label="% of the layer's tokens")
    axes.set(xlabel="expert", title=f"Expert load (even would be {100 / experts:.3g}% each)")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    return figure


def spectrum_lines(spectra: Spectra) -> Any:
    """Singular values across each bond, relative to the largest, mean over experts: a line for each
    layer, the darkest the first; in the title the effective rank, mean over the layers."""
    from matplotlib import colormaps

    panels = {
        f"{kind}, bond {k + 1}": [bonds[k] for bonds in weights.values() if k < len(bonds)]
        for kind, weights in spectra.items()
        for k in range(max(map(len, weights.values())))
    }
    figure, grid = _new(len(panels), 4, 2.6, 2.5)
    for axes, (title, layers) in zip(grid, panels.items(), strict=False):
        for depth, bond in enumerate(layers):
            largest = bond.singular_values[:, :1].clamp_min(1e-300)
            values = (bond.singular_values / largest).mean(0).clamp_min(1e-6)
            shade = colormaps["viridis"](depth / len(layers))
            axes.plot(range(1, len(values) + 1), values.tolist(), color=shade, linewidth=1.1)
        rank = f"effective rank {fmean(bond.used for bond in layers):.0%} of d"
        axes.set(title=f"{title}\n{rank}", xlabel="singular value number", yscale="log")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.25)
    return figure
