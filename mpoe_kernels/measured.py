"""Measured times of contractions on GPUs: if there is one, it replaces a backend's predicted time.

``measured.json`` maps the name of a GPU (as PyTorch gives it) to a table, which maps `key` of a contraction to pairs
``[slots, seconds]``. Between two measured numbers of slots the time is interpolated; there is no extrapolation.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch

from mpoe_kernels.planner import Contraction

FILE = Path(__file__).with_name("measured.json")
Table = Mapping[str, list[tuple[int, float]]]


def key(backend: str, candidate: str, plan: Contraction) -> str:
    """Everything that a time depends on except the number of slots, e.g. ``"cuda rebuild forward bfloat16 8x..x3072
    E8"``."""
    dtype = str(plan.dtype).removeprefix("torch.")
    sizes = "x".join(map(str, plan.dims))
    words = [backend, candidate, plan.phase, dtype, sizes, f"E{plan.num_experts}"]
    if plan.phase == "backward":
        words.append("need" + "".join(str(int(needed)) for needed in plan.need))
    return " ".join(words)


def read(path: Path) -> dict[str, Table]:
    """The tables of all GPUs.

    Raises:
        ValueError: an entry that is not a list of pairs of slots and positive seconds, by name.
    """
    tables: dict[str, Table] = {}
    for device, entries in json.loads(path.read_text(encoding="utf-8")).items():
        tables[device] = {
            name: sorted((int(slots), float(seconds)) for slots, seconds in entries[name]) for name in entries
        }
        for name, pairs in tables[device].items():
            if not pairs or any(slots < 0 or not seconds > 0 for slots, seconds in pairs):
                raise ValueError(
                    f"{path}: {device}: {name!r} must hold pairs of slots and positive seconds; got {pairs}"
                )
    return tables


@lru_cache(maxsize=1)
def _tables() -> dict[str, Table]:
    return read(FILE)


def table_here(device: str) -> Table:
    """The table of a GPU of this machine; empty for other devices."""
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return {}
    return _tables().get(torch.cuda.get_device_name(device), {})


def seconds_of(table: Table, backend: str, candidate: str, plan: Contraction) -> float | None:
    """Measured time of a backend's candidate for a contraction; None if it was not measured."""
    pairs = table.get(key(backend, candidate, plan)) if table else None
    if not pairs or not pairs[0][0] <= plan.slots <= pairs[-1][0]:
        return None
    above = bisect_left(pairs, plan.slots, key=lambda pair: pair[0])
    slots, seconds = pairs[above]
    if slots == plan.slots:
        return seconds
    fewer, less = pairs[above - 1]
    return less + (seconds - less) * (plan.slots - fewer) / (slots - fewer)
