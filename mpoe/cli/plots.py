"""Plots of reports as inline SVG; matplotlib is optional."""

from __future__ import annotations

import importlib.util
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# one colour per arm, told apart by colour-blind readers too (Okabe and Ito)
COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")


def have_matplotlib() -> bool:
    """Whether the [report] extra is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def _draw(paint: Callable[[Any], None], width: float = 7.0, height: float = 3.4) -> str:
    """SVG text of one figure; ``paint`` draws on the axes it is given."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    paint(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last ``width`` values, at every point."""
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        out.append(total / min(index + 1, width))
    return out


Curve = Sequence[tuple[float, float]]  # (step, value)


def validation_losses(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Curves of a run's ``metrics.jsonl`` by task; ``validation`` for a loss over all of them."""
    found: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith("eval_") and key.endswith("loss") and value is not None:
                name = key.removeprefix("eval_").removesuffix("loss").strip("_") or "validation"
                found.setdefault(name, []).append((record["step"], value))
    return found


def loss_curves(lines: Mapping[str, Curve], title: str, smoothed: bool = True) -> str:
    """Losses against the optimizer step, one line per name; with ``smoothed``, a running mean over the raw values."""

    def paint(axes: Any) -> None:
        drawn = {name: curve for name, curve in lines.items() if curve}
        for (name, curve), colour in zip(drawn.items(), itertools.cycle(COLOURS)):
            steps, losses = [step for step, _ in curve], [loss for _, loss in curve]
            if smoothed:
                axes.plot(steps, losses, color=colour, alpha=0.15, linewidth=0.8)
                losses = smooth(losses, max(1, len(losses) // 12))
            axes.plot(steps, losses, color=colour, label=name, marker=None if smoothed else "o", markersize=3)
        axes.set(xlabel="optimizer step", ylabel="loss", title=title)
        if drawn:
            axes.legend(fontsize=8)

    return _draw(paint)


def parameter_bars(arms: Sequence[dict[str, Any]]) -> str:
    """Parameters of the feed-forward experts, stacked: shared (central or dense) and per expert."""

    def paint(axes: Any) -> None:
        names = [arm["name"] for arm in arms]
        shared = [arm["parameters"]["central"] / 1e6 for arm in arms]
        own = [(arm["parameters"]["experts"] - arm["parameters"]["central"]) / 1e6 for arm in arms]
        axes.barh(names, shared, color=COLOURS[2], label="central cores (shared by the experts)")
        axes.barh(names, own, left=shared, color=COLOURS[1], label="each expert's own (or dense FFN)")
        axes.invert_yaxis()
        axes.set(xlabel="millions of parameters in feed-forward layers", title="Parameters")
        axes.legend(fontsize=8)

    return _draw(paint, height=2.8)


def expert_load(load: Sequence[Sequence[float]], title: str) -> str:
    """Share of tokens of each expert as a heat map; ``load``: tokens or shares, [layers][E]."""

    def paint(axes: Any) -> None:
        shares = [[count / (sum(layer) or 1.0) for count in layer] for layer in load]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set(xlabel="expert", ylabel="MPOE layer", title=title)
        axes.set_yticks(range(len(shares)))
        axes.figure.colorbar(image, ax=axes, label="share of tokens")

    return _draw(paint, height=2.6)
