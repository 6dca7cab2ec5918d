"""Tables on the terminal, with rich."""

from __future__ import annotations

from typing import Any

from mpoe_bench.tables import TextTable


def show(console: Any, table: TextTable, wide: bool = False) -> None:
    """Print a table and its notes; unless ``wide``, its spare columns are dropped until the rest fits."""
    from rich.measure import Measurement
    from rich.text import Text

    shown, left_out = _rich_table(table), []
    for name in () if wide else table.spare:
        if Measurement.get(console, console.options.update(max_width=10_000), shown).maximum <= console.width:
            break
        table = table.without(name)
        left_out.append(" ".join(name.split()))
        shown = _rich_table(table)
    console.print(Text(table.title, style="bold"))
    console.print(shown)
    if left_out:
        console.print(Text(f"  more in the report: {', '.join(left_out)}", style="dim"))
    for note in table.notes:
        console.print(Text(f"  {note}", style="dim"), soft_wrap=True)


def _rich_table(table: TextTable) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    prose = len(table.header) == 2  # a name and its description
    for index, name in enumerate(table.header):
        left = index == 0 or prose
        shown.add_column(name, justify="left" if left else "right", no_wrap=not left)
    for row in table.rows:
        style = "red" if row[-1] == "NO" or any(cell.endswith("MISS") for cell in row) else None
        shown.add_row(*(Text(cell) for cell in row), style=style)
    return shown
