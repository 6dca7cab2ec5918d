"""Horizontal bars: the contenders of a case, memory, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpoe.plotting import COLOURS, ladder, legend_beside, plain_ticks, save
from mpoe_bench.plots.style import LIMIT_LABEL, PHASES, embolden, label_bar, title
from mpoe_bench.tables import mebibytes

FLOOR_LABEL = "FLOPs of the plan / dense"
LOGARITHMIC_FROM = 12.0  # x dense; beyond that, short bars could not be read on a linear axis


def draw_contenders(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """x dense of every contender of a section, in both phases, with the floor of MPO contenders."""
    rows = [row for row in section["rows"] if (row.get("forward") or row.get("train")) and row["kind"] != "limit"]
    rows.sort(key=lambda row: (row.get("forward") or row.get("train"))["x"])
    phases = [phase for phase in PHASES if any(row.get(phase) for row in rows)]
    height, labels = 0.8 / len(phases), set()

    def once(label: str) -> str | None:
        """The label for the first bar that uses it, else None."""
        return None if label in labels else labels.add(label) or label

    def paint_bar(axes: Any, row: Mapping[str, Any], phase: str, at: float) -> None:
        timing, colour = row[phase], COLOURS[list(PHASES).index(phase)]
        floor = (row.get("floor") or {}).get(phase) or 0.0
        axes.barh(at, timing["x"], height, color=colour, label=once(PHASES[phase]))
        axes.plot([timing["low"], timing["high"]], [at, at], color="#222222", lw=1.2)
        label_bar(axes, f"{timing['x']:.{2 if timing['x'] < 10 else 1}f}", max(timing["high"], floor), at)
        if floor:
            ends = [at - height / 2, at + height / 2]
            axes.plot([floor] * 2, ends, color=COLOURS[3], lw=2, label=once(FLOOR_LABEL))

    def paint(axes: Any) -> None:
        for index, row in enumerate(rows):
            for k, phase in enumerate(phases):
                if row.get(phase):
                    paint_bar(axes, row, phase, index + (k - (len(phases) - 1) / 2) * height)
        highest = max(row[phase]["high"] for row in rows for phase in phases if row.get(phase))
        if highest > LOGARITHMIC_FROM:
            axes.set_xscale("log")
            plain_ticks(axes.xaxis, ladder(0.5, 1.6 * highest))
            axes.set_xlim(0.5, highest * 1.7)
        else:
            axes.set_xlim(0, highest * 1.12)
        axes.axvline(1.0, color="#444444", lw=1.0, ls="--", label=LIMIT_LABEL)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        embolden(axes, [row["kind"] == "mpoe" for row in rows])
        axes.invert_yaxis()
        axes.set_xlabel("time / dense FFN on the same tokens (thin line: 10th to 90th percentile)")
        title(axes, section["title"], machine)
        legend_beside(axes)

    save(file, paint, (10.0, 1.6 + 0.36 * len(rows)))


def draw_memory(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Weights and the measured peak of one forward + backward, stacked."""
    rows = [row for row in section["rows"] if row.get("memory", {}).get("train") and not row.get("masked")]
    rows.sort(key=lambda row: row["weight_bytes"] + row["memory"]["train"]["peak"])

    def paint(axes: Any) -> None:
        parts = {
            "weights": [row["weight_bytes"] for row in rows],
            "gradients and result, alive after the call": [row["memory"]["train"]["kept"] for row in rows],
            "temporaries and saved activations at the peak": [
                row["memory"]["train"]["peak"] - row["memory"]["train"]["kept"] for row in rows
            ],
        }
        ends = [0.0] * len(rows)
        for (label, sizes), colour in zip(parts.items(), COLOURS, strict=False):
            widths = [size / 2**20 for size in sizes]
            axes.barh(range(len(rows)), widths, left=ends, color=colour, label=label)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for index, end in enumerate(ends):
            label_bar(axes, mebibytes(end * 2**20), end, index, 8)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=8)
        embolden(axes, [row["kind"] == "mpoe" for row in rows])
        axes.set_xlim(0, max(ends) * 1.1)
        axes.invert_yaxis()
        axes.set_xlabel("MiB, forward + backward, measured")
        title(axes, f"Memory, {section['title']}", machine)
        axes.figure.legend(fontsize=8, loc="outside lower center", ncols=3)

    save(file, paint, (10.0, 2.0 + 0.3 * len(rows)))


def draw_planner(file: Path, section: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Time of the choice relative to the best measured, one bar per case, misses in another colour."""
    rows = sorted(section["rows"], key=lambda row: -row["ratio"])
    tolerance = section["tolerance"]

    def paint(axes: Any) -> None:
        labels = set()
        for index, row in enumerate(rows):
            missed = row["ratio"] > tolerance
            what = f"beyond {tolerance} x the best" if missed else f"within {tolerance} x the best"
            label = None if what in labels else what
            labels.add(what)
            axes.barh(index, row["ratio"], color=COLOURS[3] if missed else COLOURS[0], label=label)
            text = f"{row['ratio']:.2f}   {' / '.join(row['chosen'].values())}"
            text += f";  best: {' / '.join(row['best'].values())}" if missed else ""
            label_bar(axes, text, max(row["ratio"], tolerance), index)
        axes.axvline(tolerance, color="#444444", ls="--", lw=1.0)
        axes.set_xlim(0, max(*(row["ratio"] for row in rows), tolerance) * 2.4)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.invert_yaxis()
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel("time of the choice / best measured; beside the bars: the choice, forward / backward")
        count = len(section["rows"])
        title(axes, f"The choice: {section['within']} of {count} cases within {tolerance} x the best measured", machine)
        axes.legend(fontsize=8, loc="lower right")

    save(file, paint, (11.0, 1.6 + 0.24 * len(rows)))
