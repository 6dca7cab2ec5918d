"""The evidence as Markdown: one table of results, one of differences, plots, and words that follow from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpoe_bench.quality.files import write_text
from mpoe_bench.quality.plots import draw
from mpoe_bench.quality.runs import by_arm, load_records
from mpoe_bench.quality.statistics import Spread, gain, verdict

REPORT_FILE = "report.md"
Records = Sequence[Mapping[str, Any]]


def write_report(folder: Path, field: Any) -> str:
    """`report.md`, with plots where matplotlib is installed, of all finished runs in ``folder``; returns its text.

    Raises:
        ValueError: no run has finished.
    """
    records = load_records(folder)
    if not records:
        raise ValueError(f"out {folder} must hold finished runs; it holds none")
    drawn = draw(records, folder, field)
    text = "\n".join(
        [
            f"# Field {field.name}: {field.measure}",
            "",
            *result_table(records, field),
            "",
            *difference_table(records, field),
            "",
            *(f"![{file.stem}]({file.name})" for file in drawn),
            "",
        ]
    )
    write_text(folder / REPORT_FILE, text)
    return text


def result_table(records: Records, field: Any) -> list[str]:
    """One row for every arm: score, sizes, time, what router and experts did."""
    better = "lower is better" if field.lower_is_better else "higher is better"
    lines = [
        f"{field.measure} ({better}); mean ± standard deviation over seeds.",
        "",
        "| arm | seeds | score | rate | FFN weights, x dense | of Switch's | CPU seconds | router entropy |"
        " specialisation | distance of experts |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    digits = 3 if field.lower_is_better else 2
    for _, own in by_arm(records):
        first = own[0]
        lines.append(
            f"| {first['name']} | {len(own)} | {Spread.of([r['test'] for r in own]).text(digits)} | "
            f"{first['budget']['rate']:g} | {first['of_dense']:.2f} | {100 * first['of_switch']:.0f}% | "
            f"{_mean(own, 'cpu_seconds'):.0f} | {_router(own, 'entropy')} | {_router(own, 'specialisation')} | "
            f"{_optional(own)} |"
        )
    return lines


def difference_table(records: Records, field: Any) -> list[str]:
    """Gains over the dense model and over Switch, paired by seed; shares of Switch's gain."""
    arms = dict(by_arm(records))
    if "dense" not in arms:
        return ["Without the arm `dense` there is nothing to compare with."]
    switch = gain(arms["switch8"], arms["dense"], field.lower_is_better) if "switch8" in arms else None
    clear = switch is not None and verdict(switch) == "better"
    digits = 3 if field.lower_is_better else 2
    lines = [
        "Differences within each seed (same start, same data; positive = better than dense), mean ± deviation; the word"
        " is the verdict of a paired t-test at 95%.",
        "",
        "| arm | gain over dense | | share of Switch's gain |",
        "|---|---|---|---|",
    ]
    for key, own in arms.items():
        if key == "dense" or not {r["budget"]["seed"] for r in own} & {r["budget"]["seed"] for r in arms["dense"]}:
            continue
        difference = gain(own, arms["dense"], field.lower_is_better)
        share = f"{100 * difference.mean / switch.mean:.0f}%" if switch is not None and switch.mean > 0 else "-"
        lines.append(f"| {own[0]['name']} | {difference.text(digits, sign=True)} | {verdict(difference)} | {share} |")
    if switch is not None and not clear:
        lines += ["", "Switch's gain over dense is itself not significant here: its shares mean little."]
    return lines


def _mean(records: Records, key: str) -> float:
    return sum(record[key] for record in records) / len(records)


def _router(records: Records, key: str) -> str:
    values = [record["router"][key] for record in records if record["router"]]
    return f"{sum(values) / len(values):.3f}" if values else "-"


def _optional(records: Records) -> str:
    values = [record["distance"] for record in records if record["distance"] is not None]
    return f"{sum(values) / len(values):.3f}" if values else "-"
