"""The tests of the public ops on the emulated CUDA kernels, each file in a separate process."""

import os
import subprocess
import sys

import pytest

from tests.cases import ROOT

from .emulation import library

# Of the linear op's tests, only those that its own emulated tests do not cover.
FEWER = (
    "not sizes_beyond and not medium_separable and not (test_opcheck and not padded and not light)"
)
ALL = ("linear", "routing", "ffn", "spoiled", "every_op")


CASES = [
    # Their own emulated tests are in the default suite.
    *(
        pytest.param(name, FEWER if name == "linear" else "", "", marks=pytest.mark.slow, id=name)
        for name in ALL
    ),
    pytest.param("linear", "", "", marks=pytest.mark.exhaustive, id="linear, every case"),
    pytest.param(
        "spoiled", "", "slow", marks=pytest.mark.exhaustive, id="spoiled, the other cases"
    ),
]


@pytest.mark.parametrize("name, which, mark", CASES)
def test_on_the_emulated_backend(name, which, mark):
    library()  # built before the time limit begins
    environment = os.environ | {"MPOE_TEST_BACKENDS": "emulated", "OMP_NUM_THREADS": "1"}
    plugins = ("-p", "tests.cuda.emulated_plugin", "-p", "no:xdist")
    command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        *plugins,
        "-k",
        " and ".join(filter(None, ("emulated", which))),
        *(["-m", mark] if mark else []),
        f"tests/kernels/test_{name}.py",
    )
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
