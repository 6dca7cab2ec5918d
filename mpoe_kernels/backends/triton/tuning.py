"""Measured choices of tiles: off unless asked for, kept in a JSON file per architecture and Triton version."""

from __future__ import annotations

_CHOICES: dict[str, tuple[int, ...]] = {}


def lookup(architecture: str, kernel: str, dtype: object, sizes: tuple[float, ...]) -> tuple[int, ...] | None:
    return None
