"""The one style of all plots: colours, figures, axes with plain numbers. Needs matplotlib (the extra ``report``)."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Told apart by colour-blind readers too (Okabe and Ito), and by marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
_DPI = 144
_READABLE = 20  # columns up to which cells of a heat map carry their number


def have_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes ``[rows, columns]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _lay_out(figure: Any) -> None:
    """Give everything its place, once: the layout's engine would draw the figure before every file just for that."""
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def png(figure: Any) -> bytes:
    """The figure as a PNG file."""
    _lay_out(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element; its text stays text, in the font of the page."""
    from matplotlib import rc_context

    _lay_out(figure)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def save(file: Path, paint: Callable[[Any], None], size: tuple[float, float] = (8.0, 4.6)) -> None:
    """One figure with one pair of axes, painted and written as PNG."""
    figure, axes = new_figure(*size)
    paint(axes[0, 0])
    _lay_out(figure)
    figure.savefig(file)


def legend_beside(axes: Any, **options: Any) -> Any:
    """The legend to the right of the axes, where it hides nothing."""
    place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    return axes.legend(fontsize=8, **{**place, **options})


def plain_ticks(axis: Any, values: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Exactly these ticks, written as plain numbers."""
    from matplotlib.ticker import NullLocator

    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values), labels=labels or [f"{value:g}" for value in values])


def ladder(low: float, high: float, steps: Sequence[float] = (1, 2, 5)) -> list[float]:
    """Round numbers of a logarithmic axis between two limits; at most nine, those with the fewest digits first."""
    for chosen in (steps, (1, 3), (1,)):
        ticks = [m * 10.0**e for e in range(-4, 9) for m in chosen if low <= m * 10.0**e <= high]
        if len(ticks) <= 9:
            break
    return ticks


def heat_map(
    axes: Any, values: Sequence[Sequence[float]], names: Sequence[str], high: float, form: str, label: str
) -> None:
    """Values [rows][columns] from 0 to ``high`` as shades; a row for each name, numbers where they can be read."""
    image = axes.imshow(values, aspect="auto", cmap="Blues", vmin=0.0, vmax=high)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(values[0]) <= _READABLE:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                colour = "white" if value > 0.6 * high else "black"
                axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)
    axes.figure.colorbar(image, ax=axes, label=label)


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values, at every point."""
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        out.append(total / min(index + 1, width))
    return out
