"""Random inputs: each works or is refused in our words. `test_at_length.py` tries hundreds of each kind."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from . import fuzz_commands, fuzz_configs, fuzz_files
from .fuzz import Case, what_became_of

KINDS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "configurations": lambda draw, folder: fuzz_configs.cases(draw),
    "command lines": fuzz_commands.cases,
    "data and configuration files": fuzz_files.data_files,
    "checkpoints": fuzz_files.checkpoints,
}


@pytest.fixture
def quiet() -> Iterator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(verbosity)


def tried(kind: str, count: int, seed: int, folder: Path) -> Counter[str]:
    """How many of ``count`` inputs of one kind worked and were refused; what they need on disk lies in ``folder``."""
    found: Counter[str] = Counter()
    for case, _ in zip(KINDS[kind](random.Random(f"{kind} {seed}"), folder), range(count), strict=False):
        try:
            found[what_became_of(case)] += 1
        except BaseException as error:
            error.add_note(case.what)
            raise
    return found


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", KINDS)
def test_a_slice(kind: str, tmp_path: Path) -> None:
    found = tried(kind, 50, seed=0, folder=tmp_path)
    assert found["worked"] > 0
    assert found["refused"] > 0


def test_the_command_lines_that_are_changed_work(tmp_path: Path) -> None:
    inside = fuzz_commands.prepare(tmp_path)
    for command in fuzz_commands.COMMANDS:
        fuzz_commands.run([command, *fuzz_commands.start_of(command, 0)], inside)
