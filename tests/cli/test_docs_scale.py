"""docs/scale.md: its table is what its formulas give, its launch lines run."""

from __future__ import annotations

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpoe import MPOEConfig, load_mpoe
from mpoe.cli.plan import count, scaled
from mpoe.estimation import Usage, model_costs, take_inventory

from .cli_documents import LAUNCH, blocks

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
LINES = [line for block in blocks(PAGE, "bash") for line in block.splitlines()]


def all_reduce(size: float, nodes: int, gpus: int) -> tuple[float, float]:
    """Bytes that a device sends inside its node and to other nodes, so that ``size`` bytes are summed over all."""
    return 2 * (gpus - 1) / gpus * size, 2 * (nodes - 1) / nodes * size / gpus


def sizes_of(experts: int, nodes: int, gpus: int = 8, tokens: int = 4096) -> dict[str, list[str]]:
    """The table's cells by design, by the page's formulas from the parameters that `mpoe plan` counts."""
    usage = Usage({"encoder": tokens, "decoder": tokens}, torch.bfloat16, training=True)
    costs = model_costs(take_inventory("t5-large"), MPOEConfig(num_experts=experts, shape="separable"), usage)
    whole = costs["totals"]["whole"]
    mpoe, switch = whole["mpoe"]["parameters"], whole["switch"]["parameters"]
    dense = costs["totals"]["feed_forward"]["dense"]["parameters"]
    slower = 1 if nodes > 1 else 0  # the link between nodes, or inside the only one
    group = math.gcd(experts, nodes * gpus)
    own, rest = dense * (experts // group), switch - dense * experts
    inside = min(group, gpus)
    sent = 4 * 48 * tokens * 1024 * 2
    exchanged = (inside - 1) / group * sent, (group - inside) / group * sent
    replicas = max(1, gpus // group)
    shared, replicated = (
        all_reduce(4 * rest, nodes, gpus),
        all_reduce(4 * own, nodes * gpus // group // replicas, replicas),
    )
    summed, ours = shared[slower] + replicated[slower], all_reduce(4 * mpoe, nodes, gpus)[slower]
    even = max(0.0, (ours - summed) / exchanged[slower]) * tokens

    def row(parameters: int, exchanged: float, gradients: float) -> list[str]:
        return [count(parameters), scaled(16 * parameters, "B"), scaled(exchanged, "B"), scaled(gradients, "B")]

    return {
        "MPOE": [*row(mpoe, 0, ours), ""],
        f"Switch over {group}": [*row(own + rest, exchanged[slower], summed), f"{even:,.0f}"],
    }


def test_the_table_is_what_its_formulas_give() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] in ("64", "512")]
    assert len(rows) == 7
    for experts, devices, design, *cells in rows:
        nodes = 512 if devices == "any" else int(devices.replace(",", "")) // 8
        assert sizes_of(int(experts), nodes)[design] == cells


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
