"""Random data files and configuration files: bytes of good ones spoilt, read through the public functions."""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mpoe.cli.options import ExpertOptions, ModelOptions
from mpoe.cli.parsing import parse
from mpoe.cli.tasks import DataOptions
from mpoe.data.detect import load_task_from_folder

from .fuzz import Case, spoil_bytes

ROWS = [(f"the film number {i} is {'good' if i % 2 else 'bad'}", i % 2) for i in range(6)]
TABLES = {
    ".jsonl": "".join(f'{{"sentence": "{text}", "label": {label}}}\n' for text, label in ROWS),
    ".csv": "sentence,label\n" + "".join(f'"{text}, really",{label}\n' for text, label in ROWS),
    ".tsv": "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS),
    ".txt": "\n\n".join(text for text, _ in ROWS),
}
CONFIGS = {
    ".json": '{"model": "t5", "num_experts": 4, "tasks": ["a", "b"], "capacity_factor": 1.25, "text_columns": null}',
    ".yaml": "model: t5\nnum_experts: 4\ntasks: [a, b]\ncapacity_factor: 1.25\nlabel_words: {0: bad, 1: good}\n",
}


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """An endless stream; every case has a folder of its own below ``folder``."""
    for number in range(1_000_000):
        own = folder / str(number)
        own.mkdir(parents=True)
        if draw.random() < 0.35:
            suffix = draw.choice(sorted(CONFIGS))
            file = own / f"run{suffix}"
            file.write_bytes(spoil_bytes(CONFIGS[suffix].encode(), draw))
            groups = [ModelOptions, DataOptions, ExpertOptions]
            yield Case(f"{file}", partial(parse, groups, [], file), [str(file), "configuration", *_options(groups)])
            continue
        suffix = draw.choice(sorted(TABLES))
        good = TABLES[suffix].encode()
        for split in ("train", "validation"):
            data = spoil_bytes(good, draw) if split == "train" or draw.random() < 0.3 else good
            if draw.random() < 0.15:
                (own / f"{split}{suffix}.gz").write_bytes(spoil_bytes(gzip.compress(data), draw))
            else:
                (own / f"{split}{suffix}").write_bytes(data)
        yield Case(f"{own}/train{suffix}", partial(load, own), [str(own), "data_dir"])


def load(folder: Path) -> None:
    """Read a task and touch every item."""
    task = load_task_from_folder(folder, "task")
    for split in ("train", "validation"):
        for example in task.examples(split):
            if not isinstance(example.source, str):
                raise AssertionError(f"a source is {example.source!r}")


def _options(groups: list[type]) -> list[str]:
    return [name for group in groups for name in group.__dataclass_fields__]  # type: ignore[attr-defined]
