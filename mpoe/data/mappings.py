"""Text files, JSON and YAML files that hold one mapping, and the names in nested mappings."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_utf8(name: str, file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; the message starts with ``name`` and gives the byte.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} must be UTF-8 text; byte {error.start} of {file} is not"
        ) from None


def read_mapping(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read a JSON or YAML mapping; an empty YAML file is an empty mapping.

    Args:
        path: the file.
        name: what the file is, for messages: "configuration file".

    Raises:
        ValueError: the file is absent, has another suffix, is not UTF-8, is malformed (with the
            line) or is not a mapping.
    """
    file = Path(path)
    if file.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ValueError(f"the {name} must be a .json, .yaml or .yml file; got {str(path)!r}")
    if not file.is_file():
        raise ValueError(f"{name} not found: {file}")
    values = _parsed(file, read_utf8(f"the {name}", file))
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{file}: expected a mapping of names to values; got {type(values).__name__}"
        )
    return {str(key): value for key, value in values.items()}


def _parsed(file: Path, text: str) -> Any:
    import yaml

    kind = "JSON" if file.suffix.lower() == ".json" else "YAML"
    where = ""
    reason = ""
    try:
        values = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
        return {} if values is None and kind == "YAML" else values
    except json.JSONDecodeError as error:
        where = f", line {error.lineno}, column {error.colno}"
        reason = error.msg
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = str(error.problem or error.context)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:
        reason = str(
            error
        )  # a number too long, brackets nested too deeply, or a value that does not fit its tag
    raise ValueError(f"{file}{where}: bad {kind}: {reason}")


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything in nested mappings, in order."""
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, values
