"""``report.html`` of `mpoe inspect`: one self-contained file with explanations."""

from __future__ import annotations

import colorsys
import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mpoe.cli.html import facts as fact_table
from mpoe.cli.html import image, note, table, write_page
from mpoe.models.report import short_name
from mpoe.models.summary import LEGEND

if TYPE_CHECKING:
    from mpoe.inspection.routes import Route

_STYLE = """
.routes { overflow-x: auto; } .routes table { margin: .3rem 0 1rem; } .routes td, .routes th { border: 0; }
.routes td { padding: .12rem .3rem; text-align: center; white-space: pre; border: 1px solid #fff; }
.routes th { padding: .12rem .5rem; font-weight: 400; text-align: left; white-space: nowrap; color: var(--soft); }
.routes td, .routes td:first-child { text-align: center; } .routes .token { font-weight: 600; }
.legend span { display: inline-block; text-align: center; min-width: 1.6em; margin: 0 .25rem .25rem 0; }
"""
_LINE = 96  # characters and gaps that fit side by side
_GAP = 2


def expert_colour(expert: int, num_experts: int) -> str:
    """A light background for black text; consecutive experts have very different hues."""
    hue = (expert * 0.618034) % 1.0 if num_experts > 12 else expert / num_experts
    lightness = (0.78, 0.86)[expert % 2]
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def _lines(route: Route) -> Iterator[range]:
    """Tokens that fit side by side, as ranges of their positions."""
    start, width = 0, 0
    for t, token in enumerate(route.tokens):
        cell = max(len(token), *(len(_label(layer[t])) for layer in route.experts)) + _GAP
        if width + cell > _LINE and t > start:
            yield range(start, t)
            start, width = t, 0
        width += cell
    yield range(start, len(route.tokens))


def _label(experts: Sequence[int]) -> str:
    return "+".join(map(str, experts))


def _cell(experts: Sequence[int], probabilities: Sequence[float], num_experts: int) -> str:
    title = ", ".join(f"expert {e}: p = {p:.2f}" for e, p in zip(experts, probabilities, strict=True))
    colour = expert_colour(experts[0], num_experts)
    return f'<td style="background:{colour}" title="{title}">{_label(experts)}</td>'


def _route_tables(route: Route, num_experts: int) -> str:
    parts = [f"<h4>{html.escape({'main': 'tokens'}.get(route.stream, route.stream + ' tokens'))}</h4>"]
    for span in _lines(route):
        cells = "".join(f'<td class="token">{html.escape(route.tokens[t]) or "&nbsp;"}</td>' for t in span)
        rows = [f"<tr><th></th>{cells}</tr>"]
        for layer, experts, probabilities in zip(route.layers, route.experts, route.probabilities, strict=True):
            line = "".join(_cell(experts[t], probabilities[t], num_experts) for t in span)
            rows.append(f"<tr><th>{html.escape(short_name(layer))}</th>{line}</tr>")
        parts.append(f"<table>{''.join(rows)}</table>")
    return "".join(parts)


def routes_html(
    texts: Sequence[tuple[str, Sequence[Route]]], num_experts: int, names: Sequence[str] | None = None
) -> str:
    """Tables of which expert took which token: a column for each token, a row for each layer."""
    told = [f"{number} {html.escape(name)}" for number, name in enumerate(names)] if names else range(num_experts)
    legend = "".join(
        f'<span style="background:{expert_colour(expert, num_experts)}">{name}</span>'
        for expert, name in enumerate(told[:64])
    )
    parts = [f'<p class="legend">Experts: {legend}</p>']
    for text, routes in texts:
        parts.append(f"<p><b>{html.escape(text)}</b></p>")
        parts += [f'<div class="routes">{_route_tables(route, num_experts)}</div>' for route in routes]
    return "".join(parts)


def write_inspection(
    file: Path,
    title: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, str, Mapping[str, bytes], str]],
    weights: Sequence[Sequence[str]],
) -> None:
    """Write the report.

    Args:
        file: output file.
        title: title of the page.
        facts: names and values that describe the model.
        sections: heading, a paragraph on how to read it, plots by file name, further HTML.
        weights: header and rows of the table of MPO weights.
    """
    parts: list[str] = [f"<h1>{html.escape(title)}</h1>", fact_table(facts)]
    for heading, words, plots, extra in sections:
        parts += [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(words)}</p>"]
        parts += [image(name, png, heading) for name, png in plots.items()]
        parts.append(extra)
    if len(weights) > 1:
        parts += ["<h2>MPO weights</h2>", table(weights[0], weights[1:]), note(LEGEND)]
    write_page(file, title, parts, _STYLE)
