"""Small files of a run, written so that a reader (or a kill) never sees half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"


def write_json(path: Path, values: Any) -> None:
    """Write JSON under another name, then rename."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def check_not_file(name: str, folder: Path) -> Path:
    """``folder``, unless a file is in its way (ValueError)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} must be a folder; {folder} is a file")
    return folder
