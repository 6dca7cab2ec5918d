"""Two hundred random inputs: each works or is refused in our words. `tools/reliability.py` runs thousands."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mpoe.config.checks import check_number

from . import fuzz, fuzz_commands
from .run_fuzz import KINDS, run_kind


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice(kind: str, tmp_path: Path) -> None:
    outcome = run_kind(kind, 50, seed=0, folder=tmp_path)
    assert outcome.problems == []
    assert outcome.inputs == 50
    assert outcome.worked > 0
    assert outcome.refused > 0


def test_the_command_lines_that_are_changed_work(tmp_path: Path) -> None:
    inside = fuzz_commands.prepare(tmp_path)
    for command in fuzz_commands.COMMANDS:
        fuzz_commands.run([command, *fuzz_commands.start_of(command, 0)], inside)


def test_problems_are_noticed() -> None:
    """The oracle can fail: an error from inside, one that names nothing, and a case without an end."""

    def forever() -> None:
        while True:
            pass

    fuzz_seconds, fuzz.SECONDS = fuzz.SECONDS, 0.05
    try:
        cases = [
            fuzz.Case("from inside", lambda: int("x")),
            fuzz.Case("names nothing", lambda: check_number("length", -1, 0.0), ["width"]),
            fuzz.Case("endless", forever),
            fuzz.Case("refused", lambda: check_number("length", -1, 0.0), ["length"]),
            fuzz.Case("fine", lambda: check_number("length", 1, 0.0), ["length"]),
        ]
        outcome = fuzz.run_cases(cases, len(cases))
    finally:
        fuzz.SECONDS = fuzz_seconds
    assert [problem.partition(":")[0] for problem in outcome.problems] == ["from inside", "names nothing", "endless"]
    assert (outcome.worked, outcome.refused) == (1, 1)


def test_the_same_seed_gives_the_same_inputs(tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        stream = KINDS["configurations"](random.Random(3), tmp_path)
        texts.append([next(stream).what for _ in range(20)])
    assert texts[0] == texts[1]
