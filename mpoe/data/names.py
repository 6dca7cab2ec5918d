"""Look-ups by name whose errors list the known names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``.

    Raises:
        ValueError: no such name; the message gives the close matches and every known name.
    """
    if name in table:
        return table[name]
    close = difflib.get_close_matches(str(name), list(table), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise ValueError(f"unknown {kind} {name!r}: {hint}known: {', '.join(sorted(table)) or 'none'}")
