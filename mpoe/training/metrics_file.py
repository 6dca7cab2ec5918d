"""`metrics.jsonl`: one JSON object per log call, appended and flushed, readable after any crash."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends records to `folder/metrics.jsonl`; numbers that JSON cannot hold (NaN, infinity) are written as null."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / METRICS_FILE

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, stamped with the time (seconds since the epoch)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_clean({**record, "time": round(time.time(), 3)}))
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read() != b"\n":
                    file.write(b"\n")  # a killed process left half a line: start a new line
            file.write(line.encode() + b"\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file (or of the folder that holds one), in order.

    Half-written lines are skipped. If a resumed run repeated records (those after the step at which it resumed), only
    the later ones are kept.
    """
    path = Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    records: list[dict[str, Any]] = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("event") == "resume":
            records = [earlier for earlier in records if earlier.get("step", 0) <= record["step"]]
        records.append(record)
    return records


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, torch tensors
        return _clean(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
