"""Plots of a run as PNG files; matplotlib is optional."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.machine import title_of
from mpoe_bench.targets import best_row
from mpoe_kernels.testing.cases import workload_shape

# Told apart by colour-blind readers too (Okabe and Ito), and by marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"
PLOTTED_PEERS = ("dense experts, loop", "dense experts, grouped_mm")
FLOOR_NOTE = "FLOP floor of the plan"
Series = dict[str, list[tuple[float, float, float, float]]]  # name -> (abscissa, x, low, high)


def have_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def _save(file: Path, paint: Callable[[Any], None], size: tuple[float, float] = (8.0, 4.6)) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure.add_subplot())
    figure.savefig(file)


def _beside(axes: Any, **options: Any) -> None:
    """The legend to the right of the axes, where it hides nothing."""
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, **options)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Exactly these ticks, written as plain numbers."""
    from matplotlib.ticker import NullLocator

    axis.set_major_locator(NullLocator())
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(list(values), labels=[f"{value:g}" for value in values])


def _ratio_axis(axes: Any, values: Sequence[float], label: str) -> None:
    """A logarithmic axis of ratios with readable ticks, and the dense FFN's line."""
    axes.set_yscale("log")
    low, high = min([*values, 1.0]) / 1.15, max([*values, 1.0]) * 1.2
    ladder = [m * 10**e for e in range(-2, 5) for m in (1, 1.5, 2, 3, 5, 7)]
    ticks = [t for t in ladder if low <= t <= high]
    while len(ticks) > 9:
        ticks = [t for t in ticks if t == 1.0 or ticks.index(t) % 2 == ticks.index(1.0) % 2]
    _plain_ticks(axes.yaxis, ticks)
    axes.set_ylim(low, high)
    axes.axhline(1.0, color="#444444", linewidth=1.0, linestyle="--", label="dense FFN (the limit)")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)


def _title(axes: Any, what: str, machine: Mapping[str, Any]) -> None:
    axes.set_title(f"{what}\n{title_of(dict(machine))}", fontsize=10)


def _ffn_sections(results: Mapping[str, Any], **wanted: Any) -> list[Mapping[str, Any]]:
    """FFN and decode sections whose case has the wanted values; uniform load only."""
    found = []
    for section in results["sections"]:
        case = section.get("case", {})
        known = section["key"] in ("ffn", "decode") and case["load"] == "uniform"
        if known and all(case[key] == value for key, value in wanted.items()):
            found.append(section)
    return found


def _collect(sections: Sequence[Mapping[str, Any]], key: str, phase: str) -> Series:
    """x dense of every shape (its fastest backend) and of the plotted peers, against a value of the case."""
    points: dict[str, dict[float, tuple[float, float, float]]] = {}
    for section in sections:
        shapes = {row["shape"] for row in section["rows"] if row["kind"] == "mpoe" and row.get("shape")}
        rows = {f"mpoe {shape}": best_row(section["rows"], shape, phase) for shape in sorted(shapes)}
        rows |= {row["name"]: row for row in section["rows"] if row["name"] in PLOTTED_PEERS}
        for name, row in rows.items():
            if row is not None and row.get(phase):
                timing = row[phase]
                values = (timing["x"], timing["low"], timing["high"])
                points.setdefault(name, {}).setdefault(section["case"][key], values)
    return {name: [(k, *values) for k, values in sorted(found.items())] for name, found in points.items()}


def _curves(file: Path, series: Series, xlabel: str, what: str, phase: str, machine: Mapping[str, Any]) -> None:
    def paint(axes: Any) -> None:
        abscissae = sorted({point[0] for points in series.values() for point in points})
        for (name, points), colour, marker in zip(series.items(), COLOURS * 2, MARKERS * 2, strict=False):
            at, x, low, high = (list(column) for column in zip(*points, strict=True))
            errors = [[v - w for v, w in zip(x, low, strict=True)], [w - v for v, w in zip(x, high, strict=True)]]
            errors = [[max(e, 0.0) for e in side] for side in errors]
            line = ":" if name in PLOTTED_PEERS else "-"
            axes.errorbar(at, x, errors, label=name, color=colour, marker=marker, ms=5, lw=1.6, ls=line, capsize=2)
        axes.set_xscale("log", base=2)
        _plain_ticks(axes.xaxis, abscissae)
        axes.set_xlabel(xlabel)
        both = {"forward": "forward", "train": "forward + backward"}[phase]
        _ratio_axis(axes, [v for points in series.values() for p in points for v in p[1:]], f"time / dense FFN, {both}")
        _title(axes, what, machine)
        _beside(axes)

    _save(file, paint)


def _bars(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """x dense of every contender of one section, both phases."""
    rows = [row for row in section["rows"] if row.get("forward") and row["kind"] != "limit"]
    rows.sort(key=lambda row: row["forward"]["x"])

    def paint(axes: Any) -> None:
        phases = [p for p in ("forward", "train") if any(row.get(p) for row in rows)]
        height, noted = 0.8 / len(phases), False
        for k, phase in enumerate(phases):
            label = {"forward": "forward", "train": "forward + backward"}[phase]
            for index, row in enumerate(rows):
                if row.get(phase):
                    timing, at = row[phase], index + (k - (len(phases) - 1) / 2) * height
                    floor = (row.get("floor") or {}).get(phase) or 0.0
                    axes.barh(at, timing["x"], height, color=COLOURS[k], label=label if index == 0 else None)
                    axes.plot([timing["low"], timing["high"]], [at, at], color="#222222", linewidth=1.2)
                    axes.annotate(
                        f"{timing['x']:.3g}",
                        (max(timing["high"], floor), at),
                        xytext=(3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=7,
                    )
                    if floor:
                        ends = [at - height / 2, at + height / 2]
                        axes.plot([floor] * 2, ends, color=COLOURS[3], lw=2, label=None if noted else FLOOR_NOTE)
                        noted = True
        values = [row[p]["high"] for row in rows for p in phases if row.get(p)]
        if max(values) > 12:
            axes.set_xscale("log")
            _plain_ticks(
                axes.xaxis, [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if t < 2 * max(values)]
            )
            axes.set_xlim(0.4, max(values) * 1.6)
        else:
            axes.set_xlim(0, max(values) * 1.12)
        axes.axvline(1.0, color="#444444", linewidth=1.0, linestyle="--", label="dense FFN (the limit)")
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("time / dense FFN on the same tokens (black: 10th to 90th percentile)")
        _title(axes, section["title"], machine)
        _beside(axes)

    _save(file, paint, (10.0, 1.6 + 0.36 * len(rows)))


def _memory(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Weights and measured peak of one forward + backward, stacked."""
    rows = [row for row in section["rows"] if row.get("memory", {}).get("train") and not row.get("masked")]
    rows.sort(key=lambda row: row["weight_bytes"] + row["memory"]["train"]["peak"])

    def paint(axes: Any) -> None:
        names = [row["name"] for row in rows]
        weights = [row["weight_bytes"] / 2**20 for row in rows]
        kept = [row["memory"]["train"]["kept"] / 2**20 for row in rows]
        extra = [(row["memory"]["train"]["peak"] - row["memory"]["train"]["kept"]) / 2**20 for row in rows]
        axes.barh(names, weights, color=COLOURS[0], label="weights")
        axes.barh(names, kept, left=weights, color=COLOURS[1], label="gradients and result, alive after the call")
        start = [w + k for w, k in zip(weights, kept, strict=True)]
        axes.barh(names, extra, left=start, color=COLOURS[2], label="temporaries and saved activations at the peak")
        for index, (at, more) in enumerate(zip(start, extra, strict=True)):
            axes.annotate(
                f"{at + more:.0f}", (at + more, index), (3, 0), textcoords="offset points", va="center", size=8
            )
        axes.set_xlim(0, max(a + b for a, b in zip(start, extra, strict=True)) * 1.1)
        axes.tick_params(axis="y", labelsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("MiB, forward + backward, measured")
        _title(axes, f"Memory, {section['title']}", machine)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.16), ncols=3)

    _save(file, paint, (10.0, 2.0 + 0.3 * len(rows)))


def _roofline(file: Path, results: Mapping[str, Any]) -> None:
    """Achieved FLOP/s of our forwards against the plans' arithmetic intensity, below the measured roofs."""
    machine = results["machine"]
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for section in _ffn_sections(results):
        for row in section["rows"]:
            if row["kind"] == "mpoe" and not row.get("masked") and row.get("forward") and row.get("bytes"):
                at = (row["flops"] / row["bytes"], row["flops"] / row["forward"]["seconds"] / 1e9)
                points.setdefault((row["shape"], section["case"]["dtype"]), []).append(at)

    def paint(axes: Any) -> None:
        shapes = sorted({shape for shape, _ in points})
        intensities = [at for found in points.values() for at, _ in found]
        edges = [min(intensities) / 2, max(intensities) * 2]
        for dtype, style, grey in (("float32", "-", "#222222"), ("bfloat16", "--", "#888888")):
            if any(found == dtype for _, found in points):
                ridge = machine["roofs"][dtype] / machine["roofs"]["bandwidth"]
                grid = sorted({*edges, min(max(ridge, edges[0]), edges[1])})
                roof = [min(machine["roofs"][dtype], i * machine["roofs"]["bandwidth"]) / 1e9 for i in grid]
                axes.plot(grid, roof, style, color=grey, label=f"measured roof, {dtype}")
        for (shape, dtype), found in sorted(points.items()):
            colour = COLOURS[shapes.index(shape) % len(COLOURS)]
            hollow = {"facecolors": "none"} if dtype == "bfloat16" else {"facecolors": colour}
            axes.scatter(*zip(*found, strict=True), s=34, edgecolors=colour, label=f"{shape}, {dtype}", **hollow)
        axes.set(xscale="log", yscale="log")
        axes.set_xlabel("arithmetic intensity of the plan, FLOP per byte of memory traffic")
        axes.set_ylabel("achieved GFLOP/s, forward")
        axes.grid(alpha=0.25, which="both")
        _title(axes, "Roofline of MPO feed-forward layers", machine)
        _beside(axes)

    _save(file, paint)


def _planner(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Time of the planner's choice over the best measured, one bar per case, misses in another colour."""
    rows = sorted((row for row in section["rows"] if row["ratio"] is not None), key=lambda row: -row["ratio"])

    def paint(axes: Any) -> None:
        ratios = [row["ratio"] for row in rows]
        missed = [ratio > section["tolerance"] for ratio in ratios]
        axes.barh(range(len(rows)), ratios, color=[COLOURS[3] if miss else COLOURS[0] for miss in missed])
        for index, row in enumerate(rows):
            text = f"{row['ratio']:.2f}   {' / '.join(row['chosen'].values())}"
            text += f";  best: {' / '.join(row['best'].values())}" if missed[index] else ""
            at = (max(ratios[index], section["tolerance"]), index)
            axes.annotate(text, at, (4, 0), textcoords="offset points", va="center", fontsize=7)
        axes.axvline(section["tolerance"], color="#444444", linestyle="--", linewidth=1.0)
        axes.set_xlim(0, max(*ratios, section["tolerance"]) * 2.4)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel(f"time of the planner's choice / best measured (dashed: {section['tolerance']})")
        what = f"Planner: {section['within']} of {len(section['rows'])} cases within {section['tolerance']} x the best"
        _title(axes, what, machine)

    _save(file, paint, (11.0, 1.6 + 0.24 * len(rows)))


def _bonds(sections: Sequence[Mapping[str, Any]], phase: str) -> Series:
    """x dense of the paper's shape against its largest bond, one line per case."""
    series: Series = {}
    for section in sections:
        case, points = section["case"], []
        for shape in {row["shape"] for row in section["rows"] if str(row.get("shape")).startswith("paper_")}:
            row = best_row(section["rows"], shape, phase)
            if row is not None:
                bond = max(workload_shape(shape, case["model"], case["hidden"]).bond_dims)
                points.append((float(bond), row[phase]["x"], row[phase]["low"], row[phase]["high"]))
        name = section["title"].removeprefix("FFN ")
        if len(points) > max(1, len(series.get(name, ()))):
            series[name] = sorted(points)
    return series


def draw(results: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw every plot that the results have data for into ``folder``; returns (file name, caption)."""
    drawn: list[tuple[str, str]] = []
    machine = results["machine"]

    def add(name: str, caption: str, paint: Callable[[Path], None]) -> None:
        paint(folder / f"{name}.png")
        drawn.append((f"{name}.png", caption))

    mains = [section for section in _ffn_sections(results) if section["key"] == "ffn"]
    for number, section in enumerate(_largest(mains, 3)):
        add(f"contenders_{number}", section["title"], lambda f, s=section: _bars(f, s, machine))
    for phase, what in (("forward", "forward"), ("train", "forward + backward")):
        for key, label, fixed in (("tokens", "tokens T", "experts"), ("experts", "experts E", "tokens")):
            common = {"dtype": "float32"} | ({"model": mains[0]["case"]["model"]} if mains else {})
            for value in sorted({section["case"][fixed] for section in mains}):
                series = _collect(_ffn_sections(results, **common, **{fixed: value}), key, phase)
                series = {name: points for name, points in series.items() if len(points) > 1}
                if series:
                    letter = {"experts": "E", "tokens": "T"}[fixed]
                    caption = f"x dense against {key}, {letter} = {value}, float32, {what}"
                    name = f"{key}_{letter}{value}_{phase}"
                    add(name, caption, lambda f, s=series, c=caption, n=label, p=phase: _curves(f, s, n, c, p, machine))
        bonds = _bonds(mains, phase)
        if bonds:
            caption = f"x dense against the bond, the paper's shape, {what}"
            name = f"bonds_{phase}"
            add(
                name,
                caption,
                lambda f, s=bonds, c=caption, p=phase: _curves(f, s, "largest bond (rightmost: full)", c, p, machine),
            )
    for section in _largest([s for s in mains if s["case"]["train"]], 1):
        add("memory", f"memory, {section['title']}", lambda f, s=section: _memory(f, s, machine))
    if mains:
        add("roofline", "roofline", lambda f: _roofline(f, results))
    for section in results["sections"]:
        if section["key"] == "planner" and any(row["ratio"] for row in section["rows"]):
            add("planner", section["title"], lambda f, s=section: _planner(f, s, machine))
    return drawn


def _largest(sections: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The sections with the most contenders that were timed, in their own order."""
    timed = {id(section): sum(bool(row.get("forward")) for row in section["rows"]) for section in sections}
    chosen = sorted(sections, key=lambda section: -timed[id(section)])[:count]
    return [section for section in sections if any(section is other for other in chosen)]
