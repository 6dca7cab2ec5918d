"""The evidence as Markdown: tables of results, of the plan's comparisons and of costs, and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.quality.files import write_text
from mpoe_bench.quality.plots import draw
from mpoe_bench.quality.runs import PLAN_FILE, by_arm, load_records
from mpoe_bench.quality.statistics import Spread, gain, score_of, verdict

REPORT_FILE = "report.md"
Records = Sequence[Mapping[str, Any]]


def write_report(folder: Path, field: Any) -> str:
    """Write `report.md`, with plots if matplotlib is installed, of all finished runs in ``folder``; returns its text.

    Raises:
        ValueError: no run has finished.
    """
    records = load_records(folder)
    if not records:
        raise ValueError(f"out {folder} must hold finished runs; it holds none")
    drawn = draw(records, folder, field)
    measure = field.measure if "test" in records[0] else field.measure.replace("test", "validation")
    text = "\n".join(
        [
            f"# Field {field.name}: {measure}",
            "",
            *result_table(records, field, measure),
            "",
            *comparison_table(records, folder, field),
            *cost_table(records),
            "",
            *(f"![{file.stem}]({file.name})" for file in drawn),
            "",
        ]
    )
    write_text(folder / REPORT_FILE, text)
    return text


def result_table(records: Records, field: Any, measure: str) -> list[str]:
    """One row for every arm: rate, size, score, the gain over `field.reference` (or the first arm), paired by seed."""
    arms = dict(by_arm(records))
    base = arms.get(field.reference) or next(iter(arms.values()), [])
    switch = gain(arms["switch8"], base, field.lower_is_better) if base and "switch8" in arms else None
    of_base = f" over {base[0]['name']}" if base else ""
    better = "lower is better" if field.lower_is_better else "higher is better"
    lines = [
        f"Score: {measure} ({better}), mean ± standard deviation over seeds. Gain{of_base}: within each seed"
        " (same start, same data), positive = better; the word is the verdict of a paired t-test at 95%.",
        "",
        "| arm | seeds | rate | FFN weights, x dense | of Switch's | score | gain | | share of Switch's gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    digits = 3 if field.lower_is_better else 2
    for own in arms.values():
        lines.append(
            f"| {own[0]['name']} | {len(own)} | {own[0]['budget']['rate']:g} | {own[0]['of_dense']:.2f} | "
            f"{100 * own[0]['of_switch']:.0f}% | {Spread.of([score_of(r) for r in own]).text(digits)} | "
            f"{' | '.join(_gain(own, base, switch, field.lower_is_better, digits))} |"
        )
    if any(record.get("before") is not None for record in records):
        before = next(record["before"] for record in records if record.get("before") is not None)
        lines += ["", f"Before training: {before:.{digits}f}."]
    if switch is not None and verdict(switch) != "better":
        lines += ["", "Switch's gain is itself not significant here, so that there are no shares of it."]
    return lines


def comparison_table(records: Records, folder: Path, field: Any) -> list[str]:
    """The differences that the plan named before any run, if their arms have a seed in common."""
    file, arms = folder / PLAN_FILE, dict(by_arm(records))
    pairs = json.loads(file.read_text(encoding="utf-8"))["plan"].get("comparisons", []) if file.exists() else []
    rows = []
    for one, other in pairs:
        seeds = [{record["budget"]["seed"] for record in arms.get(arm, [])} for arm in (one, other)]
        if seeds[0] & seeds[1]:
            found = gain(arms[one], arms[other], field.lower_is_better)
            names = f"{arms[one][0]['name']} | {arms[other][0]['name']}"
            rows.append(f"| {names} | {found.count} | {found.text(4, sign=True)} | {verdict(found)} |")
    if not rows:
        return []
    return ["Named before the first run:", "", "| arm | beside | seeds | gain | |", "|---|---|---|---|---|", *rows, ""]


def _gain(own: Records, base: Records, switch: Spread | None, lower_is_better: bool, digits: int) -> tuple[str, ...]:
    """Gain, verdict and share of Switch's gain; dashes where there is nothing to compare."""
    seeds = {r["budget"]["seed"] for r in own} & {r["budget"]["seed"] for r in base}
    if not seeds or own[0]["arm"] == base[0]["arm"]:
        return "-", "-", "-"
    difference = gain(own, base, lower_is_better)
    clear = switch is not None and verdict(switch) == "better"
    share = f"{100 * difference.mean / switch.mean:.0f}%" if switch is not None and clear else "-"
    return difference.text(digits, sign=True), verdict(difference), share


def cost_table(records: Records) -> list[str]:
    """One row for every arm: what it cost, and what its router and experts did."""
    lines = [
        "| arm | parameters trained, thousands | CPU seconds | peak memory, MB | router entropy | specialisation |"
        " distance of experts |",
        "|---|---|---|---|---|---|---|",
    ]
    for _, own in by_arm(records):
        trained, memory = own[0].get("trained", own[0]["parameters"]), own[0].get("peak_memory")
        lines.append(
            f"| {own[0]['name']} | {trained / 1e3:,.0f} | {_mean(own, 'cpu_seconds'):.0f} | "
            f"{'-' if memory is None else f'{memory / 1e6:,.0f}'} | {_router(own, 'entropy')} | "
            f"{_router(own, 'specialisation')} | {_optional(own)} |"
        )
    return lines


def _mean(records: Records, key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def _router(records: Records, key: str) -> str:
    values = [record["router"][key] for record in records if record["router"]]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _optional(records: Records) -> str:
    values = [record["distance"] for record in records if record["distance"] is not None]
    return f"{sum(values) / len(values):.3f}" if values else "-"
