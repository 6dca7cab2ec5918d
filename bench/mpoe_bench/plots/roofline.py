"""Achieved FLOP/s against the plan's arithmetic intensity, compared with what torch reaches on the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.plotting import COLOURS, MARKERS, ladder, legend_beside, plain_ticks, save
from mpoe_bench.plots.style import title
from mpoe_bench.targets import best_row

Point = tuple[float, float]  # FLOP per byte, GFLOP/s


def _points(sections: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Point]]:
    """Forward passes of MPO experts by shape, dtype and tokens, on the fastest backend."""
    points: dict[tuple[str, str, int], list[Point]] = {}
    for section in sections:
        case = section["case"]
        for shape in {row["shape"] for row in section["rows"] if row["kind"] == "mpoe" and row.get("shape")}:
            row = best_row(section["rows"], shape, "forward")
            if row is not None and row.get("bytes"):
                at = (row["flops"] / row["bytes"], row["flops"] / row["forward"]["seconds"] / 1e9)
                points.setdefault((shape, case["dtype"], case["tokens"]), []).append(at)
    return points


def draw_roofline(file: Path, sections: Sequence[Mapping[str, Any]], machine: Mapping[str, Any]) -> None:
    """Colours show the shape, markers the number of tokens; hollow markers are bfloat16."""
    points, roofs = _points(sections), machine["roofs"]
    shapes, dtypes, tokens = (sorted({key[k] for key in points}) for k in range(3))

    def paint_roofs(axes: Any, edges: Sequence[float]) -> list[Any]:
        lines = []
        for dtype, style in (("float32", "-"), ("bfloat16", "--")):
            if dtype in dtypes:
                ridge = roofs[dtype] / roofs["bandwidth"]
                grid = sorted({*edges, min(max(ridge, edges[0]), edges[1])})
                roof = [min(roofs[dtype], intensity * roofs["bandwidth"]) / 1e9 for intensity in grid]
                lines += axes.plot(grid, roof, style, color="#444444", lw=1.4, label=f"torch's GEMM and copy, {dtype}")
        return lines

    def paint(axes: Any) -> None:
        intensities = [x for found in points.values() for x, _ in found]
        edges = [min(intensities) / 2, max(intensities) * 2]
        lines = paint_roofs(axes, edges)
        for (shape, dtype, count), found in points.items():
            colour = COLOURS[shapes.index(shape) % len(COLOURS)]
            face = "none" if dtype == "bfloat16" else colour
            marker = MARKERS[tokens.index(count) % len(MARKERS)]
            axes.scatter(*zip(*found, strict=True), s=34, edgecolors=colour, facecolors=face, marker=marker)
        axes.set(xscale="log", yscale="log")
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            plain_ticks(axis, ladder(*limits))
        axes.set_xlabel("arithmetic intensity of the plan, FLOP per byte of memory traffic")
        axes.set_ylabel("achieved GFLOP/s, forward")
        axes.grid(alpha=0.25)
        title(axes, "Roofline of MPO feed-forward layers", machine)
        _legends(axes, lines)

    def _legends(axes: Any, lines: Sequence[Any]) -> None:
        def sample(label: str, colour: str, marker: str, face: str) -> Any:
            style = {"color": colour, "marker": marker, "markerfacecolor": face, "linestyle": "none", "label": label}
            return axes.plot([], [], **style)[0]

        kinds = [sample(s, COLOURS[k % len(COLOURS)], "s", COLOURS[k % len(COLOURS)]) for k, s in enumerate(shapes)]
        kinds += [
            sample(f"{count:,} token{'s' if count > 1 else ''}", "#444444", MARKERS[k % len(MARKERS)], "#444444")
            for k, count in enumerate(tokens)
        ]
        kinds += [sample("hollow: bfloat16", "#444444", "o", "none")] if "bfloat16" in dtypes else []
        legend_beside(axes, handles=[*lines, *kinds])

    save(file, paint, (8.6, 4.8))
