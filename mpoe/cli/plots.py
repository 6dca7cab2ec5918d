"""Plots of reports as inline SVG; matplotlib is optional."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpoe.plotting import COLOURS, heat_map, new_figure, smooth, svg


def _draw(paint: Callable[[Any], None], width: float = 7.0, height: float = 3.4) -> str:
    """SVG text of one figure; ``paint`` draws on the axes it is given."""
    figure, axes = new_figure(width, height)
    paint(axes[0, 0])
    return svg(figure)


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
        axes.barh(names, shared, color=COLOURS[0], label="central cores (shared by the experts)")
        axes.barh(names, own, left=shared, color=COLOURS[1], label="each expert's own (or dense FFN)")
        axes.invert_yaxis()
        axes.set(xlabel="millions of parameters in feed-forward layers", title="Parameters")
        axes.legend(fontsize=8)

    return _draw(paint, height=2.8)


def load_map(load: Sequence[Sequence[float]], title: str) -> str:
    """Share of tokens of each expert as a heat map; ``load``: tokens or shares, [layers][E]."""

    def paint(axes: Any) -> None:
        shares = [[count / (sum(layer) or 1.0) for count in layer] for layer in load]
        heat_map(axes, shares, list(map(str, range(len(shares)))), max(map(max, shares)), "{:.2f}", "share of tokens")
        axes.set(xlabel="expert", ylabel="MPOE layer", title=title)

    return _draw(paint, height=2.6)
