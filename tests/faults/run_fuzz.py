"""The kinds of random inputs, by name."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import logging

from . import fuzz_checkpoints, fuzz_commands, fuzz_configs, fuzz_data
from .fuzz import Case, Outcome, run_cases

KINDS: dict[str, Callable[[random.Random, Path], Iterator[Case]]] = {
    "configurations": lambda draw, folder: fuzz_configs.cases(draw),
    "command lines": fuzz_commands.cases,
    "data and configuration files": fuzz_data.cases,
    "checkpoints": fuzz_checkpoints.cases,
}


def run_kind(kind: str, count: int, seed: int, folder: Path) -> Outcome:
    """Run ``count`` inputs of one kind; what they need on disk lies in ``folder``."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run_cases(KINDS[kind](random.Random(f"{kind} {seed}"), folder), count)
    finally:
        logging.set_verbosity(verbosity)
