"""What all plots share: colours, files, titles, axes with plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.machine import title_of

# Told apart by colour-blind readers too (Okabe and Ito), and by marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
PHASES = {"forward": "forward", "train": "forward + backward"}
LIMIT_LABEL = "dense FFN (the limit)"


def save(file: Path, paint: Callable[[Any], None], size: tuple[float, float] = (8.0, 4.6)) -> None:
    """One figure with one pair of axes, painted and written as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure.add_subplot())
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
        ticks = [m * 10.0**e for e in range(-4, 8) for m in chosen if low <= m * 10.0**e <= high]
        if len(ticks) <= 9:
            break
    return ticks


def title(axes: Any, what: str, machine: Mapping[str, Any]) -> None:
    """The case and, below it, the machine."""
    axes.set_title(f"{what}\n{title_of(dict(machine))}", fontsize=10)


def label_bar(axes: Any, text: str, at: float, row: float, size: int = 7) -> None:
    """A number to the right of a horizontal bar."""
    axes.annotate(text, (at, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=size)


def embolden(axes: Any, ours: Sequence[bool]) -> None:
    """Names of our own contenders in bold."""
    for name, own in zip(axes.get_yticklabels(), ours, strict=True):
        name.set_fontweight("bold" if own else "normal")
