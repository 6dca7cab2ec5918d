"""`mpoe train --resume` on another number of processes, as its users start it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpoe.training import find_last_checkpoint, read_metrics

BATCH, STEPS, SAVED = 4, 5, 2


def losses(run: Path) -> list[float]:
    return [record["task_loss"] + record["aux_loss"] for record in read_metrics(run) if "task_loss" in record]


def stopped(run: Path, folder: Path) -> Path:
    """A copy of a run as it was after checkpoint SAVED."""
    shutil.copytree(run, folder)
    for path in (*folder.glob("checkpoint-*"), *folder.glob("*.safetensors"), folder / "results.json"):
        if path.name != f"checkpoint-{SAVED}":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = [record for record in read_metrics(folder) if record["step"] <= SAVED]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    assert find_last_checkpoint(folder) == folder / f"checkpoint-{SAVED}"
    return folder


@pytest.mark.exhaustive  # test_distributed.py's slow tests do the same without the command line
def test_a_run_goes_on_with_another_number_of_processes(cli, sentiment: Path, tmp_path: Path) -> None:
    flags = ["train", "--model", "t5", "--data_dir", sentiment, "--num_experts", 2, "--gradient_mask_prob", 0.5]
    flags += ["--max_steps", STEPS, "--save_steps", SAVED, "--save_total_limit", 9, "--eval_steps", STEPS]
    flags += ["--logging_steps", 1, "--learning_rate", 1e-3, "--use_cpu", "--disable_tqdm", "true"]

    def train(ranks: int, folder: Path, *more: str) -> str:
        arguments = [*flags, "--per_device_train_batch_size", BATCH // ranks, "--output_dir", folder, *more]
        if ranks == 1:
            answer = cli(*arguments)
            assert answer.code == 0, answer.err
            return str(answer.out)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, "-m", "mpoe", *arguments]
        done = subprocess.run(
            [sys.executable, *map(str, launch)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    one, two = tmp_path / "one", tmp_path / "two"
    train(1, one)
    train(2, two)
    assert len(losses(one)) == STEPS
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for ranks, run in ((2, one), (1, two)):
        resumed = stopped(run, tmp_path / f"{run.name}-resumed")
        assert f"resuming from checkpoint-{SAVED}" in train(ranks, resumed, "--resume")
        assert losses(resumed) == pytest.approx(losses(one), rel=1e-5)
        assert (resumed / "results.json").is_file()
