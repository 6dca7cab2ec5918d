"""The written report: Markdown with every table, and the plots in the same folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpoe_bench.machine import title_of
from mpoe_bench.tables import HOW_TO_READ, TextTable, machine_table, table_of, target_table


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " / ")


def markdown_table(table: TextTable) -> str:
    """A table and its notes; the first column is left-aligned."""
    header = [_cell(name).replace(" / ", " ") for name in table.header]
    lines = [
        f"### {table.title}",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---', *['---:'] * (len(header) - 1)])} |",
        *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows),
    ]
    if table.notes:
        lines += ["", "Not timed:", "", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def markdown_report(results: Mapping[str, Any], plots: Sequence[tuple[str, str]] = ()) -> str:
    """The report of a run.

    Args:
        results: what `mpoe_bench.run_suite` returned, or the stored JSON.
        plots: (file name, caption) of the plots in the report's folder.

    Raises:
        ValueError: results with another schema.
    """
    from mpoe_bench.run import SCHEMA

    if results.get("schema") != SCHEMA:
        raise ValueError(f"results must have schema {SCHEMA}; got {results.get('schema')!r}")
    machine = results["machine"]
    command = f"mpoe bench --suite {results['suite']}"
    parts = [
        f"# {command}\n",
        f"{title_of(dict(machine))}; {machine['date']}; took {results['seconds']:.0f} s.\n",
        HOW_TO_READ + "\n",
    ]
    if results.get("skipped"):
        parts.append(f"The time did not suffice for: {'; '.join(results['skipped'])}.\n")
    if results["targets"]:
        parts.append(markdown_table(target_table(results["targets"])))
    parts += [f"![{caption}]({name})\n" for name, caption in plots]
    parts += [markdown_table(table_of(section)) for section in results["sections"]]
    parts.append(markdown_table(machine_table(machine)))
    return "\n".join(parts)
