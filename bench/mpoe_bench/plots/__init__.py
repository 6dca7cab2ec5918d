"""Plots of a run as PNG files; matplotlib is optional."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mpoe.plotting import have_matplotlib
from mpoe_bench.plots.bars import draw_contenders, draw_memory, draw_planner
from mpoe_bench.plots.curves import against, against_bonds, draw_curves, full_bonds
from mpoe_bench.plots.style import PHASES

__all__ = ["draw", "have_matplotlib"]
CONTENDER_PLOTS = 3


def draw(results: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Draw into ``folder`` every plot that the results have data for; returns (file name, caption) pairs."""
    drawn: list[tuple[str, str]] = []
    machine = results["machine"]

    def add(name: str, caption: str, paint: Callable[[Path], None]) -> None:
        paint(folder / f"{name}.png")
        drawn.append((f"{name}.png", caption))

    ffn = _ffn_sections(results["sections"])
    mains = [section for section in ffn if section["key"] == "ffn"]
    for number, section in enumerate(_largest(mains, CONTENDER_PLOTS)):
        add(f"contenders_{number}", section["title"], partial(draw_contenders, section=section, machine=machine))
    for phase in PHASES:
        for name, caption, label, series in _curves(ffn, mains, phase):
            full = sorted(full_bonds(mains)) if name.startswith("bonds") else ()
            add(
                name,
                caption,
                partial(
                    draw_curves, series=series, xlabel=label, what=caption, phase=phase, machine=machine, full=full
                ),
            )
    for section in _largest([s for s in mains if s["case"]["train"]], 1):
        add("memory", f"memory, {section['title']}", partial(draw_memory, section=section, machine=machine))
    for section in results["sections"]:
        if section["key"] == "planner":
            add("planner", section["title"], partial(draw_planner, section=section, machine=machine))
    return drawn


def _ffn_sections(sections: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """FFN and decode sections with uniform load."""
    return [s for s in sections if s["key"] in ("ffn", "decode") and s["case"]["load"] == "uniform"]


def _curves(
    ffn: Sequence[Mapping[str, Any]], mains: Sequence[Mapping[str, Any]], phase: str
) -> list[tuple[str, str, str, Any]]:
    """(name, caption, x-axis label, series) of every curve with at least two points, for one size of FFN."""
    if not mains:
        return []
    first, found = mains[0]["case"], []
    size = f"{first['model']}x{first['hidden']}"
    alike = [s for s in ffn if s["case"]["dtype"] == "float32" and s["case"]["model"] == first["model"]]
    for key, label, fixed, letter in (("tokens", "tokens T", "experts", "E"), ("experts", "experts E", "tokens", "T")):
        for value in sorted({section["case"][fixed] for section in mains}):
            series = against([s for s in alike if s["case"][fixed] == value], key, phase)
            if series:
                caption = f"x dense against {key}, {size} {letter}={value} float32, {PHASES[phase]}"
                found.append((f"{key}_{letter}{value}_{phase}", caption, label, series))
    bonds = against_bonds(mains, phase)
    if bonds:
        caption = f"x dense against the bond, the paper's shape, {PHASES[phase]}"
        found.append((f"bonds_{phase}", caption, "largest bond of the shape", bonds))
    return found


def _largest(sections: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The sections with the most timed contenders, in their original order."""
    timed = {id(section): sum(bool(row.get("forward")) for row in section["rows"]) for section in sections}
    chosen = sorted(sections, key=lambda section: -timed[id(section)])[:count]
    return [section for section in sections if any(section is other for other in chosen)]
