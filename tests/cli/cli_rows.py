"""Rows into a JSON lines file."""

from __future__ import annotations

import json
from pathlib import Path


def write_rows(file: Path, rows: list[dict]) -> None:
    """One JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
