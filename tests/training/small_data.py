"""A small folder of a two-class task."""

from __future__ import annotations

import json
from pathlib import Path


def write_task(folder: Path, rows: int = 40, word: str = "film") -> Path:
    folder.mkdir(parents=True)
    for split, size in (("train", rows), ("validation", 16), ("test", 8)):
        lines = [
            {"sentence": f"the {word} of {split} number {i} is {'good' if i % 2 else 'bad'}", "label": i % 2}
            for i in range(size)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
