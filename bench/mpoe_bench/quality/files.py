"""Results are written under another name and then renamed, so that a killed process never leaves half a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text completely or not at all."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.part")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: Path, values: Any) -> None:
    """Write JSON by `write_text`."""
    write_text(path, json.dumps(values, indent=1) + "\n")
