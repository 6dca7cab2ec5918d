"""Whether a long training run keeps its memory: the slope of resident memory over optimizer steps."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import numpy as np
import torch

from tests.training.tiny import Rows, mpoe_model

from .processes import resident_bytes


@dataclass(frozen=True)
class Growth:
    """Resident memory at the end, its slope by least squares, and how many tensors came into being."""

    steps: int
    resident: int
    bytes_per_step: float
    new_tensors: int


def growth(steps: int, warm: int) -> Growth:
    """Train a tiny T5 for ``steps`` steps with batches of changing sizes; the first ``warm`` fill caches."""
    model = mpoe_model("t5", dropout=0.1, jitter=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, samples, tensors = Rows("t5").rows, [], 0
    for step in range(steps):
        picked = [rows[(step + k) % len(rows)] for k in range(1 + step % 8)]
        batch = {name: torch.stack([row[name] for row in picked]) for name in picked[0]}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if step == warm - 1:
            tensors = count_tensors()
        if step >= warm:
            samples.append(resident_bytes())
    slope = float(np.polyfit(np.arange(len(samples)), samples, 1)[0])
    return Growth(steps, samples[-1], slope, count_tensors() - tensors)


def count_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
