"""Plots of reports, painted on axes or as inline SVG; matplotlib is optional."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mpoe.plotting import COLOURS, heat_map, new_figure, smooth, svg

Paint = Callable[[Any], None]
PANEL = (4.6, 3.1)  # size in inches of a plot shown next to others, or alone on a phone


def draw(paint: Paint, width: float = 7.0, height: float = 3.4) -> str:
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


def training_panels(records: Sequence[Mapping[str, Any]]) -> list[Paint]:
    """The panels of a run's ``metrics.jsonl``: task loss and, for a mixture, balancing loss and expert load."""

    def curve(key: str) -> list[tuple[float, float]]:
        return [(r["step"], r[key]) for r in records if r.get(key) is not None and "step" in r]

    validation = validation_losses(records)
    several = list(validation) != ["validation"]
    names = {name: f"{name}, validation" if several else name for name in validation}
    shown = [
        ("Task loss", [("training", curve("task_loss") or curve("loss"), COLOURS[0])]),
        ("Balancing loss", [("weighted, all layers", curve("aux_loss"), COLOURS[2])]),
        (
            "Expert load",
            [
                ("entropy / ln E, mean over layers", curve("expert_entropy"), COLOURS[0]),
                ("largest share, worst layer", curve("expert_max_share"), COLOURS[1]),
                ("smallest share, worst layer", curve("expert_min_share"), COLOURS[4]),
            ],
        ),
    ]

    def panel(title: str, lines: Sequence[tuple[str, Curve, str]]) -> Paint:
        def paint(axes: Any) -> None:
            for label, points, colour in lines:
                _line(axes, points, label, colour)
            if title == "Task loss":
                for (name, points), colour in zip(validation.items(), itertools.cycle(COLOURS[1:])):
                    _line(axes, points, names[name], colour, "o")
            if title == "Expert load":
                axes.set_ylim(0, 1.02)
            _finish(axes, title)

        return paint

    return [panel(title, drawn) for title, lines in shown if (drawn := [line for line in lines if line[1]])]


def _line(axes: Any, curve: Curve, label: str, colour: str, marker: str = "") -> None:
    """A curve with dots, or its running mean over the pale raw values."""
    steps, values = [step for step, _ in curve], [value for _, value in curve]
    if not marker:
        axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
        values = smooth(values, max(1, len(values) // 12))
    axes.plot(steps, values, color=colour, label=label, marker=marker or None, markersize=3)


def _finish(axes: Any, title: str, ylabel: str = "") -> None:
    axes.set(xlabel="optimizer step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def loss_curves(
    lines: Mapping[str, Curve], title: str, smoothed: bool = True, size: tuple[float, float] = (7.0, 3.4)
) -> str:
    """Losses against the optimizer step, one line per name; with ``smoothed``, a running mean over the raw values."""

    def paint(axes: Any) -> None:
        for (name, curve), colour in zip(lines.items(), itertools.cycle(COLOURS)):
            if curve:
                _line(axes, curve, name, colour, "" if smoothed else "o")
        _finish(axes, title, "loss")

    return draw(paint, *size)


def gain_size_price(arms: Sequence[dict[str, Any]], score: str, large: str) -> list[str]:
    """The comparison in one row of panels: every arm's score, size and price.

    Args:
        arms: from the demo's results.
        score: description of ``arm["mean"]``, with its unit.
        large: name of the model whose parameters and layer times are shown.
    """
    scale = 100.0 if all(arm["mean"] <= 1 for arm in arms) else 1.0
    millions = {arm["name"]: arm["large"]["parameters"] / 1e6 for arm in arms}
    return [
        _bars(f"Gain: {score}", {arm["name"]: scale * arm["mean"] for arm in arms}, "{:.1f}"),
        _bars(f"Size: {large}, millions of parameters", millions, "{:,.0f}"),
        _bars("Price: time of a layer, x dense", {arm["name"]: arm["large"]["training"] for arm in arms}, "{:.2f}"),
    ]


def _bars(title: str, values: Mapping[str, float], form: str) -> str:
    """A bar with its number for each name; MPOE's are highlighted."""

    def paint(axes: Any) -> None:
        names = list(values)
        axes.barh(names, values.values(), color=[COLOURS[0 if name.startswith("MPOE") else 7] for name in names])
        for row, name in enumerate(names):
            place = (values[name], row)
            axes.annotate(form.format(values[name]), place, (5, 0), textcoords="offset points", va="center")
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(title, fontsize=11, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.xaxis.set_visible(False)

    return draw(paint, 4.4, 2.4)


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

    return draw(paint, height=2.8)


def size_bars(reports: Mapping[str, Mapping[str, int]]) -> str:
    """Parameters of whole models by kind, a bar for each; ``reports``: name -> parameter report."""
    kinds = {"rest": COLOURS[7], **dict(zip(("central", "auxiliary", "expert", "router"), COLOURS, strict=False))}

    names = ["\n".join(textwrap.wrap(name, 14)) for name in reports]

    def paint(axes: Any) -> None:
        left = [0.0] * len(reports)
        for kind, colour in kinds.items():
            width = [report.get(kind, 0) / 1e6 for report in reports.values()]
            if any(width):
                axes.barh(names, width, left=left, color=colour, label=kind)
                left = [a + b for a, b in zip(left, width, strict=True)]
        dense = [0 if total else report["total"] / 1e6 for report, total in zip(reports.values(), left, strict=True)]
        if any(dense):
            axes.barh(names, dense, color=COLOURS[6], label="dense model")
        axes.invert_yaxis()
        axes.set(xlabel="millions of parameters", title="Parameters")
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=3, frameon=False)

    return draw(paint, *PANEL)


def load_map(load: Sequence[Sequence[float]], title: str, names: Sequence[str] = ()) -> str:
    """Share of tokens of each expert as a heat map; ``load``: tokens or shares, [layers][E]; ``names``: of layers."""
    size = (min(8.0, 1.8 + 0.36 * len(load[0])), 1.4 + 0.28 * len(load))
    return draw(lambda axes: paint_load(axes, load, title, names), *size)


def paint_load(axes: Any, load: Sequence[Sequence[float]], title: str, names: Sequence[str] = ()) -> None:
    """Draw the heat map of `load_map`, in per cent of the layer's tokens."""
    shares = [[100 * count / (sum(layer) or 1.0) for count in layer] for layer in load]
    experts = len(shares[0])
    rows = list(names) or list(map(str, range(len(shares))))
    heat_map(axes, shares, rows, max(map(max, shares)), "{:.0f}", "% of the layer's tokens")
    axes.set_xticks(range(0, experts, max(1, experts // 16)))
    axes.set(
        xlabel="expert", ylabel="" if names else "layer", title=f"{title} (even would be {100 / experts:.3g}% each)"
    )
