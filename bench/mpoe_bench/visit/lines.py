"""Results that grow line by line, so that an interrupted visit continues where it stopped."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Lines:
    """A file of JSON objects, one per line, each with a unique ``key``.

    Attributes:
        path: the file; rows that it already holds are kept.
        rows: the rows by key.
    """

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            whole, _, torn = self.path.read_text(encoding="utf-8").rpartition("\n")
            if torn:  # the machine was lost in the middle of a line
                self.path.write_text(whole + "\n" if whole else "", encoding="utf-8")
            self.rows = {row["key"]: row for row in map(json.loads, filter(None, whole.split("\n")))}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Append a row; it is in the file when this returns."""
        self.rows[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")


@dataclass(frozen=True)
class Deadline:
    """Nothing new is started after ``end`` (as `time.monotonic` counts)."""

    end: float = math.inf

    @classmethod
    def of_minutes(cls, minutes: float | None) -> Deadline:
        return cls(math.inf if minutes is None else time.monotonic() + 60 * minutes)

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def parse(module: str, doc: str, words: Sequence[str] | None) -> argparse.Namespace:
    """The options that the measuring parts of a visit share."""
    parser = argparse.ArgumentParser(prog=f"python -m mpoe_bench.visit.{module}", description=doc)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="folder; lines already in it are kept")
    parser.add_argument("--minutes", type=float, help="start nothing new after this time; default: no limit")
    return parser.parse_args(words)


def finish(name: str, done: int, kept: int, left: Iterable[object], wrong: Sequence[str]) -> int:
    """Print the last lines of a part; returns its exit status: 1 if something is wrong or nothing was measured."""
    for line in wrong:
        print(f"wrong: {line}")
    missing = len(list(left))
    print(f"{name}: {done} measured, {kept} from before, {missing} left, {len(wrong)} wrong", flush=True)
    return 1 if wrong or done + kept == 0 else 0
