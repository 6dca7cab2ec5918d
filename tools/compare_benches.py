"""Two versions of the package side by side: `mpoe bench` reports of both, run in turn, as ratios of their x dense.

    python tools/compare_benches.py --before a1 a2 a3 --after b1 b2 b3 [--out pairs.json]

Folders that `mpoe bench --out` wrote, the first before with the first after and so on. Each line is a contender in a
case and phase: its x dense in every run, and the ratio after / before of every pair, median and range. Contenders that
run no kernel of ours show what the machine's noise alone does to such a ratio.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from mpoe_bench.targets import PHASES


class Line(NamedTuple):
    """What was measured."""

    case: str
    contender: str
    phase: str


def lines_of(report: dict[str, Any]) -> dict[Line, float]:
    """x dense of every contender but the dense layer itself."""
    return {
        Line(section["title"], row["name"], phase): row[phase]["x"]
        for section in report["sections"]
        for row in section["rows"]
        for phase in PHASES
        if row.get(phase) and row["name"] != section["baseline"]
    }


def compared(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every line that all reports have.

    Raises:
        ValueError: not as many reports after as before, or different suites, threads or processors.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"after must name as many folders as before; got {len(after)} and {len(before)}")
    settings = {
        json.dumps([r["suite"], *(r["machine"][key] for key in ("processor", "family", "threads"))])
        for r in (*before, *after)
    }
    if len(settings) > 1:
        raise ValueError(f"all reports must be of one suite, processor and number of threads; got {sorted(settings)}")
    old, new = [lines_of(r) for r in before], [lines_of(r) for r in after]
    rows = []
    for line in old[0]:
        if all(line in found for found in (*old, *new)):
            ratios = [b[line] / a[line] for a, b in zip(old, new, strict=True)]
            rows.append(
                {
                    **line._asdict(),
                    "before": [found[line] for found in old],
                    "after": [found[line] for found in new],
                    "ratio": median(ratios),
                    "range": [min(ratios), max(ratios)],
                }
            )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    out = ["| case | contender | phase | before | after | after / before |", "|---|---|---|---|---|---|"]
    for row in rows:
        low, high = row["range"]
        numbers = (
            f"{median(row['before']):.2f} | {median(row['after']):.2f} | {row['ratio']:.3f} ({low:.3f}-{high:.3f})"
        )
        out.append(f"| {row['case']} | {row['contender']} | {PHASES[row['phase']]} | {numbers} |")
    return "\n".join(out)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("before", "after"):
        parser.add_argument(f"--{name}", type=Path, nargs="+", required=True, help="folders, in the order of the pairs")
    parser.add_argument("--out", type=Path, help="JSON file of all rows")
    chosen = parser.parse_args(words)
    reports = [
        [json.loads((folder / "results.json").read_text(encoding="utf-8")) for folder in folders]
        for folders in (chosen.before, chosen.after)
    ]
    try:
        rows = compared(*reports)
    except ValueError as error:
        parser.error(str(error))
    print(table(rows))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
