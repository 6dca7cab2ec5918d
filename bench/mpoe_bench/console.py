"""Tables on the terminal, with rich."""

from __future__ import annotations

from typing import Any

from mpoe_bench.tables import TextTable


def show(console: Any, table: TextTable) -> None:
    """Print one table and its notes."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(table.title, style="bold"))
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index == 0 else "right", no_wrap=index > 0)
    for row in table.rows:
        style = "red" if row[-1] == "NO" or any(cell.endswith("MISS") for cell in row) else None
        shown.add_row(*(Text(cell) for cell in row), style=style)
    console.print(shown)
    for note in table.notes:
        console.print(Text(f"  {note}", style="dim"), soft_wrap=True)
