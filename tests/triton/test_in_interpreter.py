"""Runs the files of tests/triton/interpreted in processes with Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpoe_kernels.triton.architecture import in_interpreter

pytestmark = [
    pytest.mark.skipif(in_interpreter(), reason="already in the interpreter"),
    pytest.mark.usefixtures("with_triton"),
]
SLOW, EXHAUSTIVE = "pytest.mark.slow", "pytest.mark.exhaustive"
FOLDER = Path(__file__).parent / "interpreted"


def marked(mark):
    """Files with a test that has the mark."""
    return [path for path in sorted(FOLDER.glob("test_*.py")) if mark in path.read_text()]


def run(paths, *options):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["MPOE_TEST_BACKENDS"] = "triton"  # of tests/kernels
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = (
        "1"  # no plugin is needed, and importing some takes seconds
    )
    if options:  # not in the default suite, where it would take half of the time
        environment["MPOE_INTERPRETER_CHECKS_OVERFLOW"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", *options, *map(str, paths)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        cwd=FOLDER.parents[2],
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.first
@pytest.mark.emulated
def test_in_a_process_of_their_own():
    """All files in one process, because its imports take as long as the tests of a file."""
    run([FOLDER])


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", marked(EXHAUSTIVE), ids=lambda path: path.stem)
def test_exhaustive_ones_in_a_process_of_their_own(path):
    run([path], "-m", "exhaustive")


@pytest.mark.slow
@pytest.mark.parametrize("path", marked(SLOW), ids=lambda path: path.stem)
def test_slow_ones_in_a_process_of_their_own(path):
    run([path], "-m", "slow")


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("not slow", marks=pytest.mark.slow),
        pytest.param("slow", marks=pytest.mark.exhaustive),
    ],
)
def test_spoiled_rows(which):
    spoiled = FOLDER.parents[1] / "kernels/test_spoiled.py"
    run([spoiled], "-p", "tests.triton.interpreted.conftest", "-W", "ignore", "-m", which)
