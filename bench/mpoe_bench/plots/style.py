"""Common parts of a run's plots, in addition to `mpoe.plotting`: titles, bar labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpoe_bench.machine import title_of

PHASES = {"forward": "forward", "train": "forward + backward"}
LIMIT_LABEL = "dense FFN (the limit)"


def title(axes: Any, what: str, machine: Mapping[str, Any]) -> None:
    """The case and, below it, the machine."""
    axes.set_title(f"{what}\n{title_of(dict(machine))}", fontsize=10)


def label_bar(axes: Any, text: str, at: float, row: float, size: int = 7) -> None:
    """A number to the right of a horizontal bar."""
    axes.annotate(text, (at, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=size)


def embolden(axes: Any, ours: Sequence[bool]) -> None:
    """Set the names of MPO contenders in bold."""
    for name, own in zip(axes.get_yticklabels(), ours, strict=True):
        name.set_fontweight("bold" if own else "normal")
