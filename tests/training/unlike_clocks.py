"""Clocks by which another candidate is the fastest: for choices that must not depend on a timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

LAST = -1


def preferring(place: int) -> Callable[[list[Any], str], list[float]]:
    """In place of `autotune._seconds`: the candidate at ``place`` of those that are timed is the fastest."""

    def seconds(runs: list[Any], device: str) -> list[float]:
        return [0.001 if k == place % len(runs) else 1.0 for k in range(len(runs))]

    return seconds
