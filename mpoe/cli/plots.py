"""Plots of the demo's report as inline SVG; matplotlib is optional."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Sequence
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


def _smooth(values: Sequence[float], width: int) -> list[float]:
    out, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        out.append(total / min(index + 1, width))
    return out


def loss_curves(arms: Sequence[dict[str, Any]]) -> str:
    """Training loss against the step, one line per arm: ``arm["loss"]`` is a list of (step, loss)."""

    def paint(axes: Any) -> None:
        for arm, colour in zip(arms, COLOURS, strict=False):
            if arm["loss"]:
                steps, losses = zip(*arm["loss"], strict=True)
                width = max(1, len(losses) // 12)
                axes.plot(steps, losses, color=colour, alpha=0.15, linewidth=0.8)
                axes.plot(steps, _smooth(losses, width), color=colour, label=arm["name"])
        axes.set(xlabel="optimizer step", ylabel="training loss (task only)", title="Loss")
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


def expert_load(arm: dict[str, Any]) -> str:
    """Share of tokens each expert got on the test items, ``arm["expert_load"]`` [layers][E], as a heat map."""

    def paint(axes: Any) -> None:
        shares = [[count / max(1, sum(layer)) for count in layer] for layer in arm["expert_load"]]
        image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0.0)
        axes.set(xlabel="expert", ylabel="MPOE layer", title=f"Expert load on test items: {arm['name']}")
        axes.set_yticks(range(len(shares)))
        axes.figure.colorbar(image, ax=axes, label="share of tokens")

    return _draw(paint, height=2.6)
