"""Pieces of the self-contained HTML reports."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from mpoe.cli.files import write_text

Rows = Iterable[Sequence[str]]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
.held { background: #e3f4e6; padding: .6rem 1rem; } .failed { background: #fbe5e1; padding: .6rem 1rem; }
.text td { text-align: left; } svg, img { max-width: 100%; height: auto; } .note { color: #555; }
"""


def table(header: Sequence[str], rows: Rows, kind: str = "") -> str:
    """A table of texts; ``kind`` is its class."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def write_page(file: Path, title: str, parts: Iterable[str], style: str = "") -> None:
    """Write a page of HTML ``parts``; ``style`` comes after what all reports share."""
    write_text(
        file,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}{style}</style></head><body>{''.join(parts)}</body></html>\n",
    )
