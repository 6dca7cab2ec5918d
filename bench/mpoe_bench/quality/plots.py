"""The score against feed-forward parameters, and against the gradient mask's p_b."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe.plotting import COLOURS, legend_beside, plain_ticks, save
from mpoe_bench.plots import have_matplotlib
from mpoe_bench.quality.runs import arm_of, by_arm
from mpoe_bench.quality.statistics import Spread, score_of

Records = Sequence[Mapping[str, Any]]
MASKED = ("paper8", "mask25", "mask50", "mask75")
MARKERS = {"dense": "o", "Switch": "s", "MPOE": "D", "control": "^"}


def draw(records: Records, folder: Path, field: Any) -> list[Path]:
    """Write the plots that there are enough records for; none without matplotlib."""
    if not have_matplotlib():
        return []
    files = [folder / "parameters.png"]
    save(files[0], lambda axes: _paint_parameters(axes, records, field), (9.5, 4.8))
    masked = [(arm_of(key).mask, own) for key, own in by_arm(records) if key in MASKED]
    if len(masked) > 1:
        files.append(folder / "mask.png")
        save(files[1], lambda axes: _paint_mask(axes, masked, field))
    return files


def _kind(name: str) -> str:
    return next((kind for kind in MARKERS if name.startswith(kind)), "MPOE")


def _paint_parameters(axes: Any, records: Records, field: Any) -> None:
    colours = dict(zip(MARKERS, COLOURS, strict=False))
    seen: set[str] = set()
    names: dict[float, list[tuple[float, str]]] = {}
    for _, own in by_arm(records):
        spread, kind = Spread.of([score_of(r) for r in own]), _kind(own[0]["name"])
        at = own[0]["of_dense"]
        label = None if kind in seen else kind
        seen.add(kind)
        axes.errorbar(
            at, spread.mean, spread.deviation or 0.0, fmt=MARKERS[kind], color=colours[kind], capsize=2, label=label
        )
        short = own[0]["name"].removeprefix("dense, ").removeprefix("control: ").removeprefix("MPOE 8 ")
        short = short.replace("auxiliary rate x", "x").replace("two experts per token", "two per token")
        names.setdefault(at, []).append((spread.mean, short))
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, [1, 2, 4, 8, 16])
    axes.set_xlim(0.3, 16)
    _write_names(axes, names)
    axes.set_xlabel("weights of all feed-forward layers, x dense")
    axes.set_ylabel(field.measure)
    axes.grid(alpha=0.25)
    legend_beside(axes)


def _write_names(axes: Any, names: Mapping[float, list[tuple[float, str]]]) -> None:
    """To the right of their points; where points are crowded, to the left of all of those. At least a line apart."""
    low, high = axes.get_ylim()
    line, sizes = (high - low) / 45, sorted(names)
    crowded = [at for at in sizes if any(1.05 * at < other < 2 * at for other in sizes)]
    left = [(score, at, name) for at in crowded for score, name in names[at]]
    columns = [[(score, at, name) for score, name in names[at]] for at in sizes if at not in crowded]
    for column in (left, *columns):
        y = -math.inf
        for score, at, name in sorted(column):
            y = max(score, y + line)
            edge, side = (crowded[0] * 0.93, "right") if column is left else (at * 1.03, "left")
            axes.annotate(name, (at, score), xytext=(edge, y), va="center", ha=side, fontsize=6.5)


def _paint_mask(axes: Any, masked: Sequence[tuple[float, Records]], field: Any) -> None:
    spreads = [Spread.of([score_of(r) for r in own]) for _, own in sorted(masked, key=lambda pair: pair[0])]
    at = sorted(p for p, _ in masked)
    axes.errorbar(at, [s.mean for s in spreads], [s.deviation or 0.0 for s in spreads], marker="D", capsize=3)
    plain_ticks(axes.xaxis, at)
    axes.set_xlabel("p_b, share of steps that leave the central cores alone")
    axes.set_ylabel(field.measure)
    axes.grid(alpha=0.25)
