"""Tables on the terminal and in HTML, and the one style of all reports: a report is one self-contained file."""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from mpoe.cli import plots
from mpoe.cli.files import write_text

# Tables and wide figures scroll inside their box, so the page itself never scrolls sideways on a phone.
_STYLE = """
:root { --ink: #222; --soft: #555; --line: #ddd; --accent: #0072B2; --held: #e3f4e6; --failed: #fbe5e1; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  -webkit-text-size-adjust: 100%; }
h1, h2, h4, p, code { overflow-wrap: anywhere; } h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { margin-top: 2.2rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; font-size: 1.25rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; text-align: right; } td { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, .text td, .text th { text-align: left; } .text td { overflow-wrap: anywhere; }
.text td:first-child { overflow-wrap: normal; } .facts td:first-child { color: var(--soft); white-space: nowrap; }
.last td:last-child, .last th:last-child, .scores td:nth-child(2), .scores th:nth-child(2) { text-align: left; }
.best { white-space: nowrap; font-weight: 600; background: var(--held); }
code, pre { font: .9em ui-monospace, monospace; }
pre { background: #f5f5f5; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.failed { padding: .6rem 1rem; background: var(--failed); } .note { color: var(--soft); font-size: .93em; }
figure { margin: 1rem 0; overflow-x: auto; } svg, img { max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.panels figure { margin: 0; } .panels svg { width: 100%; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) {
  body { margin: 1rem auto; padding: 0 .9rem; font-size: 14px; } h1 { font-size: 1.35rem; } h2 { margin-top: 1.6rem; }
  th, td { padding: .25rem .4rem; } .runs th { overflow-wrap: anywhere; min-width: 5.5em; }
  .wide img, .wide svg { max-width: none; width: 640px; }
}
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 9.5pt; } .scroll, figure { overflow: visible; }
  tr, figure, pre { break-inside: avoid; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
_HTML = Environment(autoescape=True)
_TABLE = _HTML.from_string(
    '<div class="scroll"><table class="{{ kind }}">'
    "{% if header|select|list %}<thead><tr>{% for cell in header %}<th>{{ cell }}</th>{% endfor %}</tr></thead>"
    "{% endif %}<tbody>{% for row in rows %}{% set place = loop.index0 %}<tr>{% for cell in row %}"
    "<td{% if (place, loop.index0) in best %} class=best{% endif %}>{{ cell }}</td>{% endfor %}</tr>{% endfor %}"
    "</tbody></table></div>"
)
_PAGE = _HTML.from_string(
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title>'
    "<style>{{ style }}</style></head><body>{% for part in parts %}{{ part }}{% endfor %}</body></html>\n"
)


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        header: names of the columns; empty, the first column names the rows.
        rows: the cells.
        title: heading.
        words: how to read it.
        kind: classes in HTML: ``text`` (left-aligned), ``facts``, ``last``, ``scores``, ``runs``.
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
        """Print it, at least ``least_width`` wide where the width is unknown, as in a pipe; then how to read it."""
        from rich.console import Console
        from rich.table import Table as Drawn
        from rich.text import Text

        console = Console()
        if not console.is_terminal and least_width:
            console = Console(width=max(console.width, least_width))
        drawn = Drawn(title=Text(self.title) if self.title else None, show_header=any(self.header))
        for name in self.header:
            drawn.add_column(Text(name))
        for row in self._marked():
            drawn.add_row(*map(Text, row))
        console.print(drawn)
        if self.words:
            console.print(Text(self.words, style="dim"))

    def html(self) -> Markup:
        """The table alone."""
        return Markup(_TABLE.render(header=self.header, rows=self._marked(), kind=self.kind, best=set(self.best)))

    def section(self) -> Markup:
        """The table under its title, with how to read it."""
        return Markup("<h2>{}</h2>{}{}").format(self.title, self.html(), note(self.words) if self.words else "")


def facts(rows: Iterable[Sequence[str]]) -> Markup:
    """Names and values, without a header."""
    return Table((), list(rows), kind="text facts").html()


def note(text: str) -> Markup:
    """A paragraph that explains the part above it."""
    return Markup('<p class="note">{}</p>').format(text)


def image(name: str, png: bytes, alt: str) -> Markup:
    """A PNG inside the page; on a phone it scrolls sideways instead of shrinking until it is illegible."""
    data = base64.b64encode(png).decode()
    drawn = Markup('<figure class="wide"><img id="{}" alt="{}" src="data:image/png;base64,{}"></figure>')
    return drawn.format(name, alt, data)


def figures(draw: Callable[[], Iterable[str]]) -> Markup:
    """The drawings, side by side if there is room; or how to get them if matplotlib is not installed."""
    if not plots.have_matplotlib():
        return Markup('<p class="note">Plots need matplotlib: <code>pip install "mpoe[report]"</code>.</p>')
    return Markup('<div class="panels">{}</div>').format(Markup("").join(map(_figure, draw())))


def _figure(svg: str) -> Markup:
    return Markup("<figure>{}</figure>").format(Markup(svg))


def write_page(file: Path, title: str, parts: Iterable[Any], style: str = "") -> None:
    """Write a page of ``parts``, `Markup` or texts; ``style`` comes after the common style."""
    write_text(file, _PAGE.render(title=title, style=Markup(_STYLE + style), parts=parts))
