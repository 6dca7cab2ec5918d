"""x dense against tokens, experts and bonds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.plotting import COLOURS, MARKERS, ladder, legend_beside, plain_ticks, save
from mpoe_bench.cases import workload_shape
from mpoe_bench.plots.style import LIMIT_LABEL, PHASES, title
from mpoe_bench.targets import best_row

PLOTTED_PEERS = ("dense experts, loop", "dense experts, grouped_mm")
Point = tuple[float, float, float, float]  # abscissa, x dense, its 10th and 90th percentiles
Series = dict[str, list[Point]]


def against(sections: Sequence[Mapping[str, Any]], key: str, phase: str) -> Series:
    """x dense of every shape (on its fastest backend) and of the plotted peers, against a value of the case."""
    points: dict[str, dict[float, Point]] = {}
    for section in sections:
        shapes = {row["shape"] for row in section["rows"] if row["kind"] == "mpoe" and row.get("shape")}
        rows = {f"mpoe {shape}": best_row(section["rows"], shape, phase) for shape in sorted(shapes)}
        rows |= {row["name"]: row for row in section["rows"] if row["name"] in PLOTTED_PEERS}
        for name, row in rows.items():
            if row is not None and row.get(phase):
                at = float(section["case"][key])
                points.setdefault(name, {}).setdefault(at, _point(at, row[phase]))
    series = {name: [point for _, point in sorted(found.items())] for name, found in points.items()}
    return {name: found for name, found in series.items() if len(found) > 1}


def against_bonds(sections: Sequence[Mapping[str, Any]], phase: str) -> Series:
    """x dense of the paper's shape against its largest bond, one line per case."""
    series: Series = {}
    for section in sections:
        case, points = section["case"], []
        for shape in {row["shape"] for row in section["rows"] if str(row.get("shape")).startswith("paper_")}:
            row = best_row(section["rows"], shape, phase)
            if row is not None:
                points.append(_point(float(_bond(shape, case)), row[phase]))
        name = section["title"].removeprefix("FFN ")
        if len(points) > max(1, len(series.get(name, ()))):
            series[name] = sorted(points)
    return series


def full_bonds(sections: Sequence[Mapping[str, Any]]) -> set[float]:
    """The largest bonds of the paper's untruncated shape, in these cases."""
    return {float(_bond("paper_full", section["case"])) for section in sections}


def _bond(shape: str, case: Mapping[str, Any]) -> int:
    return max(workload_shape(shape, case["model"], case["hidden"]).bond_dims)


def _point(at: float, timing: Mapping[str, Any]) -> Point:
    return at, timing["x"], timing["low"], timing["high"]


def draw_curves(
    file: Path,
    series: Series,
    xlabel: str,
    what: str,
    phase: str,
    machine: Mapping[str, Any],
    full: Sequence[float] = (),
) -> None:
    """Lines with error bars on two logarithmic axes; the x values in ``full`` are marked as full bonds."""

    def paint(axes: Any) -> None:
        for (name, points), colour, marker in zip(series.items(), COLOURS * 2, MARKERS * 2, strict=False):
            at, x, low, high = (list(column) for column in zip(*points, strict=True))
            errors = [[v - w for v, w in zip(x, low, strict=True)], [w - v for v, w in zip(x, high, strict=True)]]
            errors = [[max(e, 0.0) for e in side] for side in errors]
            line = ":" if name in PLOTTED_PEERS else "-"
            axes.errorbar(at, x, errors, label=name, color=colour, marker=marker, ms=5, lw=1.6, ls=line, capsize=2)
        axes.set_xscale("log", base=2)
        abscissae = sorted({point[0] for points in series.values() for point in points})
        plain_ticks(axes.xaxis, abscissae, [f"{v:g}\n(full)" if v in full else f"{v:g}" for v in abscissae])
        axes.set_xlabel(xlabel)
        _ratio_axis(axes, [v for points in series.values() for point in points for v in point[1:]])
        axes.set_ylabel(f"time / dense FFN, {PHASES[phase]}")
        title(axes, what, machine)
        legend_beside(axes)

    save(file, paint)


def _ratio_axis(axes: Any, values: Sequence[float]) -> None:
    """A logarithmic axis for ratios, with readable ticks and the dense FFN's line."""
    axes.set_yscale("log")
    low, high = min([*values, 1.0]) / 1.15, max([*values, 1.0]) * 1.2
    plain_ticks(axes.yaxis, ladder(low, high, (1, 1.5, 2, 3, 5, 7) if high / low < 30 else (1, 2, 5)))
    axes.set_ylim(low, high)
    axes.axhline(1.0, color="#444444", linewidth=1.0, linestyle="--", label=LIMIT_LABEL)
    axes.grid(alpha=0.25)
