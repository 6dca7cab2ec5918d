"""Places in documents that tools fill in."""

from __future__ import annotations

import os
from pathlib import Path


def write_between(path: Path, name: str, text: str) -> None:
    """Replace the text between ``<!-- name -->`` and ``<!-- end of name -->`` in a document.

    Raises:
        ValueError: the document has no such place.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    old = path.read_text()
    if begin not in old or end not in old:
        raise ValueError(f"{path.name} has no place for {name!r}: {begin.strip()} ... {end}")
    head, rest = old.split(begin, 1)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(head + begin + text + "\n" + end + rest.split(end, 1)[1])
    os.replace(part, path)
