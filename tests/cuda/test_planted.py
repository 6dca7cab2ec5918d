"""Tests of the tests: every bug of planted.py, built from the real sources, is found by what should
find it."""

import os
import re
import subprocess

import pytest

from .emulation import SCHEDULES, cuda_emulate
from .planted import BUGS

# Each recompiles kernels: CI's slow tests run one bug per lane, the others run with
# `pytest -m exhaustive`.
IN_CI = (
    "unstable_scatter",
    "divergent_barrier",
    "past_the_row",
    "plain_increment",
    "past_shared_memory",
)


def marks_of(bug):
    return (pytest.mark.slow,) if bug.name in IN_CI else (pytest.mark.exhaustive,)


CASES = [
    pytest.param(bug, lane, id=f"{bug.name}-{lane}", marks=marks_of(bug))
    for bug in BUGS
    for lane in bug.found_by
]


REPORTS = {
    "address": "AddressSanitizer: heap-buffer-overflow|pointer index expression",
    "thread": "ThreadSanitizer: data race",
}


def run(program, schedule):
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    # Older compilers' thread sanitizers cannot handle newer Linux kernels' address randomisation.
    command = ["setarch", "-R", str(program), *schedule]
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | options, timeout=600
    )


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_text_to_change_is_there(bug, tmp_path):
    bug.plant(cuda_emulate.CSRC, tmp_path)
    assert (tmp_path / bug.file).read_text() != (cuda_emulate.CSRC / bug.file).read_text()


@pytest.mark.parametrize("bug, lane", CASES)
def test_the_bug_is_found(bug, lane, tmp_path):
    bug.plant(cuda_emulate.CSRC, tmp_path)
    sanitizer = lane if lane in REPORTS else ""
    program = cuda_emulate.sweep(bug.part, sanitizer, tmp_path)
    if sanitizer:  # late copies reveal some races, early copies others
        assert any(
            re.search(REPORTS[lane], run(program, schedule).stderr) for schedule in SCHEDULES
        )
        return
    if lane.startswith("error: "):
        ends = [
            (done.returncode, done.stderr)
            for done in (run(program, schedule) for schedule in SCHEDULES)
        ]
        assert any(code == 2 and lane.removeprefix("error: ") in said for code, said in ends), ends
        return
    for schedule in SCHEDULES:
        done = run(program, schedule)
        if lane == "banks":
            assert (done.returncode, done.stdout) == (1, "FAILED: no bank conflicts\n"), schedule
        elif lane == "values" or lane.removeprefix("values: ") in schedule:
            assert (done.returncode, done.stderr) == (1, ""), schedule
            assert "no bank conflicts" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("part", cuda_emulate.SWEEPS)
def test_nothing_is_found_without_a_bug(part):
    program = cuda_emulate.sweep(part)
    for schedule in SCHEDULES:
        done = run(program, schedule)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), schedule


@pytest.mark.slow
@pytest.mark.parametrize("part", cuda_emulate.SWEEPS)
@pytest.mark.parametrize("sanitizer", REPORTS)
def test_sanitizers_report_nothing_without_a_bug(sanitizer, part):
    """The thread sanitizer takes longest: each order and each kind of copies once."""
    program = cuda_emulate.sweep(part, sanitizer)
    for schedule in SCHEDULES[::3] if sanitizer == "thread" else SCHEDULES:
        done = run(program, schedule)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), schedule
