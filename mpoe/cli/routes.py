"""HTML of routes: which expert took which token, a column for each token and a row for each layer."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup

from mpoe.models.report import short_name

if TYPE_CHECKING:
    from mpoe.inspection.routes import Route

STYLE = """
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
    red, green, blue = colorsys.hls_to_rgb(hue, (0.78, 0.86)[expert % 2], 0.75)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def routes_html(
    texts: Sequence[tuple[str, Sequence[Route]]], num_experts: int, names: Sequence[str] | None = None
) -> Markup:
    """Tables of which expert took which token, under a legend of the first 64 experts, by number and name."""
    colours = [expert_colour(expert, num_experts) for expert in range(num_experts)]
    told = [f"{number} {name}" for number, name in enumerate(names)] if names else list(map(str, range(num_experts)))
    span = Markup('<span style="background:{}">{}</span>')
    known = Markup("").join(span.format(*each) for each in list(zip(colours, told, strict=True))[:64])
    parts = [Markup('<p class="legend">Experts: {}</p>').format(known)]
    for text, routes in texts:
        parts.append(Markup("<p><b>{}</b></p>").format(text))
        parts += [Markup('<div class="routes">{}</div>').format(_tables(route, colours)) for route in routes]
    return Markup("").join(parts)


def _tables(route: Route, colours: Sequence[str]) -> Markup:
    parts = [Markup("<h4>{}</h4>").format("tokens" if route.stream == "main" else f"{route.stream} tokens")]
    for span in _lines(route):
        tokens = (Markup('<td class="token">{}</td>').format(route.tokens[t] or Markup("&nbsp;")) for t in span)
        rows = [Markup("<tr><th></th>{}</tr>").format(Markup("").join(tokens))]
        for layer, experts, probabilities in zip(route.layers, route.experts, route.probabilities, strict=True):
            cells = Markup("").join(_cell(experts[t], probabilities[t], colours) for t in span)
            rows.append(Markup("<tr><th>{}</th>{}</tr>").format(short_name(layer), cells))
        parts.append(Markup("<table>{}</table>").format(Markup("").join(rows)))
    return Markup("").join(parts)


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


def _cell(experts: Sequence[int], probabilities: Sequence[float], colours: Sequence[str]) -> Markup:
    title = ", ".join(f"expert {e}: p = {p:.2f}" for e, p in zip(experts, probabilities, strict=True))
    cell = Markup('<td style="background:{}" title="{}">{}</td>')
    return cell.format(colours[experts[0]], title, _label(experts))
