"""docs/scale.md: its tables are the planner's, its launch lines run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mpoe.cli.plan_tables import size

from mpoe import load_mpoe

from .cli_documents import LAUNCH, blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
LINES = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]


def test_tables_are_what_their_commands_print(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    commands = [line for line in LINES if line.startswith("mpoe plan") and "--nodes" in line]
    tables = [block for block in blocks(PAGE, "text") if "Switch over" in block]
    assert len(commands) == len(tables) >= 2
    for command, table in zip(commands, tables, strict=True):
        printed = [line.rstrip() for line in cli(*shlex.split(command)[1:]).out.splitlines()]
        start = printed.index("h100, 8 in a node: per device and step") + 1
        expected = [line.rstrip() for line in table.splitlines()]
        assert printed[start : start + len(expected)] == expected, command


def test_the_picture_is_drawn_from_the_planner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from mpoe_bench.plots import scale

    assert (min(scale.NODES) * 8, max(scale.NODES) * 8) == (8, 4096)
    monkeypatch.setattr(scale, "NODES", (1, 8))
    drawn = {experts: scale.predictions(experts) for experts in scale.EXPERTS}
    for found in drawn.values():
        for placed in found.values():
            assert [size(each.memory_bytes) in PAGE for each in placed[:2]] == [True, True]
        mpoe, switch, *_ = found[64]
        assert size(mpoe.all_reduce.link) in PAGE
        assert size(switch.all_to_all.link) in PAGE
        assert size(switch.all_reduce.link) in PAGE
    scale.draw(tmp_path / "scale.png", drawn)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def launch(folder: Path, example: bool) -> str:
    """Run a launch line as it stands on the page, with few steps and small batches; returns what it printed."""
    launches = [line for line in LINES if line.startswith(LAUNCH)]
    assert sorted("examples/" in line for line in launches) == [False, True]
    arguments = next(shlex.split(line)[1:] for line in launches if ("examples/" in line) == example)
    if example:
        arguments = [str(ROOT / a) if a.startswith("examples/") else a for a in arguments] + ["3"]
    else:
        arguments[arguments.index("--max_steps") + 1] = "2"
        arguments += ["--per_device_train_batch_size", "4", "--use_cpu"]
    answer = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    saved = folder / next(a for a in arguments if a.startswith("runs/"))
    assert type(load_mpoe(saved)).__name__ == "MPOET5ForConditionalGeneration"
    return answer.stdout


@pytest.mark.slow
def test_the_launch_line_runs(sentiment: Path, tmp_path: Path) -> None:
    sentiment.rename(tmp_path / "my_folder")
    launch(tmp_path, example=False)
    assert (tmp_path / "runs" / "two" / "results.json").is_file()


@pytest.mark.slow
def test_the_launch_line_of_the_sharded_loop_runs(tmp_path: Path) -> None:
    assert len(re.findall(r"step \d: loss \d", launch(tmp_path, example=True))) == 2
