"""Mappings: look-ups whose errors list the known names, and JSON and YAML files that hold one mapping."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from mpoe.config.checks import check_choice

T = TypeVar("T")
MAPPING_SUFFIXES = (".json", ".yaml", ".yml")


def lookup(table: Mapping[str, T], name: str, kind: str) -> T:
    """``table[name]``.

    Raises:
        ValueError: no such name; the message gives every known name and the close matches.
    """
    check_choice(kind, name, list(table))
    return table[name]


def read_utf8(name: str, file: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: it is not UTF-8; the message starts with ``name`` and gives the byte.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text; byte {error.start} of {file} is not") from None


def read_mapping(path: str | os.PathLike[str], name: str) -> dict[str, Any]:
    """Read a JSON or YAML mapping; an empty YAML file is an empty mapping.

    Args:
        path: the file.
        name: what the file is, for messages: "configuration file".

    Raises:
        ValueError: the file is absent, has another suffix, is not UTF-8, is malformed (with the line) or is not a
            mapping.
    """
    file = Path(path)
    if file.suffix.lower() not in MAPPING_SUFFIXES:
        raise ValueError(f"the {name} must be a .json, .yaml or .yml file; got {str(path)!r}")
    if not file.is_file():
        raise ValueError(f"{name} not found: {file}")
    text = read_utf8(f"the {name}", file)
    values = _from_json(file, text) if file.suffix.lower() == ".json" else _from_yaml(file, text)
    if not isinstance(values, Mapping):
        raise ValueError(f"{file}: expected a mapping of names to values; got {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _from_json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}, column {error.colno}: bad JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number too long, or brackets nested too deeply
        raise ValueError(f"{file}: bad JSON: {error}") from None


def _from_yaml(file: Path, text: str) -> Any:
    import yaml

    try:
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{file}{where}: bad YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError) as error:  # or a value in it
        raise ValueError(f"{file}: bad YAML: {error}") from None
    return {} if values is None else values
