"""The file of kept choices: ``$XDG_CACHE_HOME/mpoe/choices.json`` (default ``~/.cache``; without a
home, the temporary folder).

A file that cannot be read, is damaged or has another format counts as empty, and is replaced where
that is possible: whatever it held is measured again.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import stat
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

VERSION = 1
LARGEST_FILE = 2**24  # bytes; a choice takes about 300
MOST_CHOICES = 20_000  # the oldest go
_LOG = logging.getLogger(__name__)


def choices_file() -> Path:
    """Where choices are kept: in this user's cache; below the temporary folder for a user without a
    home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    home = os.path.expanduser("~")
    if not os.path.isabs(base):  # the specification ignores relative paths
        # Without HOME and with an unknown user, as in containers, there is no home.
        base = os.path.join(home, ".cache") if os.path.isabs(home) else tempfile.gettempdir()
    return Path(base) / "mpoe" / "choices.json"


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Model of this machine's processor, as the system names it; a virtual machine's may be
    short."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return platform.processor()
    for line in info.splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return ""


def read_json(path: Path) -> Any:
    """Content of a small JSON file, ``None`` if there is no file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not a regular file (reading a pipe would wait for a writer), too large, or not
            JSON.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise ValueError(f"it is not a regular file of at most {LARGEST_FILE} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_json(path: Path, content: Any) -> None:
    """Write the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_choices() -> dict[str, str]:
    """The kept choices; none if the file is not readable as such."""
    path = choices_file()
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        _LOG.info("%s is ignored: %s", path, error)
        return {}
    if not isinstance(content, dict) or content.get("version") != VERSION:
        return {}
    choices = content.get("choices")
    if not isinstance(choices, dict):
        return {}
    return {key: value for key, value in choices.items() if isinstance(value, str)}


def add_choices(choices: Mapping[str, str]) -> None:
    """Keep choices beside those that other processes have written meanwhile."""
    path = choices_file()
    merged = read_choices()
    for key in choices:
        merged.pop(key, None)
    merged.update(choices)
    kept = dict(list(merged.items())[-MOST_CHOICES:])
    try:
        write_json(path, {"version": VERSION, "choices": kept})
    except OSError as error:  # a home that cannot be written: every process measures for itself
        _LOG.info("choices are not kept in %s: %s", path, error)
