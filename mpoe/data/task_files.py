"""Descriptions of tasks in YAML or JSON files: those of the package and those of the user."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path

from mpoe.data.mappings import read_mapping
from mpoe.data.spec import TaskSpec

STANDARD = Path(__file__).resolve().parent / "standard"


def read_task_file(path: str | os.PathLike[str]) -> dict[str, TaskSpec]:
    """Descriptions in a file, by name: a mapping of each task's name to the fields of :class:`TaskSpec`.

    A ``data_dir`` in the file is relative to the file.

    Raises:
        ValueError: no such file, malformed, no task in it, or a field that does not fit; the message names the file.
    """
    file = Path(path)
    specs = {}
    for name, values in read_mapping(file, "task file").items():
        try:
            spec = TaskSpec.from_mapping(name, values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        if spec.data_dir:
            spec = dataclasses.replace(spec, data_dir=str(file.parent / spec.data_dir))
        specs[name] = spec
    if not specs:
        raise ValueError(f"{file}: expected at least one task; got none")
    return specs


@functools.cache
def standard_specs() -> dict[str, TaskSpec]:
    """The descriptions that come with the package: GLUE, SuperGLUE and others."""
    specs: dict[str, TaskSpec] = {}
    for file in sorted(STANDARD.glob("*.yaml")):
        specs.update(read_task_file(file))
    return specs
