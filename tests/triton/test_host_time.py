"""`tools/host_time.py` in a separate process, because its stand-ins for a GPU are not removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import triton_predict

from mpoe_kernels.backends import triton_catalogue as catalogue
from mpoe_kernels.contract.program import PHASES
from mpoe_kernels.triton.start import recorded

ROOT = Path(__file__).resolve().parents[2]
EXPERTS, TOKENS = 2, 64


def launches_of(name: str, phase: str) -> int:
    """Launches of an up projection, with the strategy that the backend would choose on the card."""
    problem = catalogue.dims_of(catalogue.shapes()[name][0]), EXPERTS, TOKENS
    strategy = triton_predict.choice(*problem, phase).strategy
    with recorded("sm_90") as launches:
        catalogue.WORK[phase](*problem, triton_predict.DTYPE, strategy, "relu")()
    return len(launches)


@pytest.mark.slow
def test_whole_calls_start_what_the_card_would() -> None:
    command = [sys.executable, str(ROOT / "tools" / "host_time.py"), "--rounds=2"]
    sizes = f"--experts={EXPERTS}", f"--tokens={TOKENS}"
    done = subprocess.run([*command, *sizes], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    launches, ops, made_on = done.stdout.split("\n\n", 2)
    rows, calls = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
        for table in (launches, ops)
    )
    shapes = list(catalogue.shapes())
    assert [row[:2] for row in rows] == [[name, phase] for name in shapes for phase in PHASES]
    assert [row[0] for row in calls] == shapes
    for name, forward, *times, backward, of_all, with_engine in calls:
        assert int(forward) == launches_of(name, "forward")
        assert int(backward) == launches_of(name, "backward")
        assert all(int(time) > 0 for time in (*times, of_all, with_engine))
    assert all(float(cell) > 0 for row in rows for cell in row[2:])
    assert made_on.strip().startswith("Host: one core of ")
