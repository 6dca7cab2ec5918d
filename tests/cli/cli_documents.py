"""Runs what the README and the pages of docs/ tell their readers to run, on small data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpoe.data.embedded import stand_in_path

INSTALL = "python -m pip install"  # CI runs these as they stand
LAUNCH = "torchrun"  # several processes: slow, in test_docs_scale.py


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a page; those under a `<!-- run: ... -->` mark belong to CI."""
    found = re.findall(rf"(<!-- run: \w+ -->\n)?```{language}\n(.*?)```", text, flags=re.S)
    return [block for mark, block in found if not mark]


def run_commands(cli: Callable[..., Any], text: str) -> set[str]:
    """Every `mpoe` command of a page, with small models and few steps; returns the names of those that ran."""
    ran = set()
    for line in "".join(blocks(text, "bash")).splitlines():
        if not line.strip() or INSTALL in line or line.startswith(LAUNCH):
            continue
        program, command, *arguments = shlex.split(line, comments=True)
        assert program == "mpoe", line
        names = {"path/to/t5"} | ({"t5-base"} if command == "convert" else set())
        arguments = [str(stand_in_path("t5")) if a in names else a for a in arguments]
        if command == "train":
            arguments[arguments.index("--max_steps") + 1] = "2"
            arguments += ["--per_device_train_batch_size", "4", "--use_cpu"]
        if command == "bench":
            arguments += ["--scale", "tiny", "--overwrite", "--minutes", ".001"]  # tests/bench measures
        cli(command, *arguments)
        ran.add(command)
    return ran


def write_files(text: str, folder: Path) -> None:
    """Every YAML block of a page, into the file that its first line names: ``# my_tasks.yaml``."""
    for block in blocks(text, "yaml"):
        (folder / block.split("\n", 1)[0].removeprefix("# ")).write_text(block, encoding="utf-8")


def run_python(text: str) -> dict[str, Any]:
    """The Python blocks of a page, one after the other in one namespace, on our tiny T5."""
    names: dict[str, Any] = {}
    for block in blocks(text, "python"):
        exec(block.replace('"t5-base"', repr(str(stand_in_path("t5")))), names)
    return names
