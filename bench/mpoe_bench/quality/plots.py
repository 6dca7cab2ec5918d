"""The score against feed-forward parameters, and against the gradient mask's p_b."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.plots import have_matplotlib
from mpoe_bench.plots.style import COLOURS, legend_beside, plain_ticks, save
from mpoe_bench.quality.runs import arm_of, by_arm
from mpoe_bench.quality.statistics import Spread

Records = Sequence[Mapping[str, Any]]
MASKED = ("separable8", "mask25", "mask50", "mask75")
MARKERS = {"dense": "o", "Switch": "s", "MPOE": "D", "control": "^"}


def draw(records: Records, folder: Path, field: Any) -> list[Path]:
    """Write the plots that the records suffice for; none without matplotlib."""
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
    for _, own in by_arm(records):
        spread, kind = Spread.of([r["test"] for r in own]), _kind(own[0]["name"])
        at = own[0]["of_dense"]
        label = None if kind in seen else kind
        seen.add(kind)
        axes.errorbar(
            at, spread.mean, spread.deviation or 0.0, fmt=MARKERS[kind], color=colours[kind], capsize=2, label=label
        )
        short = own[0]["name"].removeprefix("dense, ").removeprefix("control: ")
        axes.annotate(short, (at, spread.mean), xytext=(5, 3), textcoords="offset points", fontsize=7)
    axes.set_xscale("log", base=2)
    plain_ticks(axes.xaxis, [1, 2, 4, 8, 16])
    axes.set_xlim(0.9, 20)
    axes.set_xlabel("weights of all feed-forward layers, x dense")
    axes.set_ylabel(field.measure)
    axes.grid(alpha=0.25)
    legend_beside(axes)


def _paint_mask(axes: Any, masked: Sequence[tuple[float, Records]], field: Any) -> None:
    spreads = [Spread.of([r["test"] for r in own]) for _, own in sorted(masked, key=lambda pair: pair[0])]
    at = sorted(p for p, _ in masked)
    axes.errorbar(at, [s.mean for s in spreads], [s.deviation or 0.0 for s in spreads], marker="D", capsize=3)
    plain_ticks(axes.xaxis, at)
    axes.set_xlabel("p_b, share of steps that leave the central cores alone")
    axes.set_ylabel(field.measure)
    axes.grid(alpha=0.25)
