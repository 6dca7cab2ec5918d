"""The common style of all HTML reports: fonts, colours, tables, figures. A report is one self-contained file."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import mpoe.plotting as plotting
from mpoe.cli.files import write_text
from mpoe.plotting import COLOURS

Rows = Iterable[Sequence[str]]

# Tables and wide figures scroll inside their box, so the page itself never scrolls sideways on a phone.
_STYLE = (
    f":root {{ --ink: #222; --soft: #555; --line: #ddd; --accent: {COLOURS[0]}; --held: #e3f4e6; --failed: #fbe5e1; }}"
    """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  -webkit-text-size-adjust: 100%; }
h1, h2, h3, h4, p, code { overflow-wrap: anywhere; } h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { margin-top: 2.2rem; border-bottom: 2px solid var(--accent); padding-bottom: .2rem; font-size: 1.25rem; }
.scroll { overflow-x: auto; margin: 1rem 0; background: /* shadows at the sides where something is cut */
  linear-gradient(90deg, #fff 30%, #fff0) 0 / 2.5rem 100% no-repeat local,
  linear-gradient(270deg, #fff 30%, #fff0) 100% / 2.5rem 100% no-repeat local,
  linear-gradient(90deg, #0003, #0000) 0 / .8rem 100% no-repeat scroll,
  linear-gradient(270deg, #0003, #0000) 100% / .8rem 100% no-repeat scroll; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; text-align: right; } td { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, .text td, .text th { text-align: left; } .text td { overflow-wrap: anywhere; }
.text td:first-child { overflow-wrap: normal; } .facts td:first-child { color: var(--soft); white-space: nowrap; }
.last td:last-child, .last th:last-child, .scores td:nth-child(2), .scores th:nth-child(2) { text-align: left; }
.best { white-space: nowrap; font-weight: 600; background: var(--held); }
code, pre { font: .9em ui-monospace, monospace; }
pre { background: #f5f5f5; padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.held, .failed { padding: .6rem 1rem; } .held { background: var(--held); } .failed { background: var(--failed); }
.note, figcaption { color: var(--soft); font-size: .93em; }
figure { margin: 1rem 0; overflow-x: auto; } svg, img { max-width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.panels figure { margin: 0; } .panels svg { width: 100%; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 640px) {
  body { margin: 1rem auto; padding: 0 .9rem; font-size: 14px; } h1 { font-size: 1.35rem; } h2 { margin-top: 1.6rem; }
  th, td { padding: .25rem .4rem; } .runs th { overflow-wrap: anywhere; min-width: 5.5em; }
  .wide::before { content: "wider than the screen: scroll sideways"; display: block; color: var(--soft);
    font-size: .85em; }
  .wide img, .wide svg { max-width: none; width: 640px; }
}
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 9.5pt; } .scroll, figure { overflow: visible; }
  h2, h4, h2 + p { break-after: avoid; } tr, figure, pre, .routes table { break-inside: avoid; }
  .panels { grid-template-columns: repeat(3, 1fr); } details .scroll { columns: 2; font-size: 7.5pt; }
  details .text td { overflow-wrap: anywhere; width: 50%; }
  th, td { padding: .15rem .4rem; }
  details::details-content { content-visibility: visible; display: block; height: auto; } summary { color: inherit; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
)


def table(header: Sequence[str], rows: Rows, kind: str = "", best: Iterable[tuple[int, int]] = ()) -> str:
    """A table of texts; ``kind`` is its class, ``best`` holds (row, column) of highlighted cells."""
    marked = set(best)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = [
        "".join(
            f"<td{' class=best' if (r, c) in marked else ''}>{html.escape(cell)}</td>" for c, cell in enumerate(row)
        )
        for r, row in enumerate(rows)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def facts(rows: Rows) -> str:
    """Names and values, without a header."""
    return table((), rows, "text facts")


def note(text: str) -> str:
    """A paragraph that explains the part above it."""
    return f'<p class="note">{html.escape(text)}</p>'


def image(name: str, png: bytes, alt: str) -> str:
    """A PNG inside the page; on a phone it scrolls sideways instead of shrinking until it is illegible."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="wide"><img id="{name}" alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></figure>'
    )


def figures(draw: Callable[[], Iterable[str]]) -> str:
    """The drawings, side by side if there is room; or how to get them if matplotlib is not installed."""
    if not plotting.have_matplotlib():
        return '<p class="note">Plots need matplotlib: <code>pip install "mpoe[report]"</code>.</p>'
    return '<div class="panels">' + "".join(f"<figure>{svg}</figure>" for svg in draw()) + "</div>"


def write_page(file: Path, title: str, parts: Iterable[str], style: str = "") -> None:
    """Write a page of HTML ``parts``; ``style`` comes after the common style."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    write_text(
        file,
        f'<!doctype html><html lang="en"><head>{head}<title>{html.escape(title)}</title>'
        f"<style>{_STYLE}{style}</style></head><body>{''.join(parts)}</body></html>\n",
    )
