"""`--load_experiment`, and what a run reports about itself, from start to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpoe.cli.evaluate import command as evaluate
from mpoe.cli.train import command as train
from mpoe.training import read_metrics

from .small_data import write_task


def test_runs_report_and_go_on_from_earlier_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        write_task(tmp_path / "data" / name)
    first, second = tmp_path / "first", tmp_path / "second"
    data = ["--data_dir", tmp_path / "data", "--eval_tasks", "other", "--n_val", 4]
    common = ["--per_device_train_batch_size", 4, "--max_steps", 1, "--use_cpu", "--disable_tqdm", "true"]
    flags = [*data, "--tasks", "one", *common, "--num_experts", 2]
    reports = ["--compute_time", "--compute_memory", "--print_num_parameters"]
    train([str(flag) for flag in [*flags, *reports, "--output_dir", first]])
    out = capsys.readouterr().out
    assert all(words in out for words in ("trainable", "per step of 4 items", "most memory used"))
    results = json.loads((first / "results.json").read_text())
    assert set(results["validation"]) == {"other"}
    assert results["time"]["seconds_per_step"] > 0
    assert results["memory"]["peak_bytes"] > 0

    (first / "config.json").rename(first / "config.away")  # as after a kill: no final model, but a checkpoint
    go_on = [*data, "--tasks", "one", *common, "--load_experiment", first, "--learning_rate", 1e-12]
    train([str(flag) for flag in [*go_on, "--output_dir", second]])
    again = json.loads((second / "results.json").read_text())
    assert again["model"] == str(first / "checkpoint-1")
    assert again["class"] == "MPOET5ForConditionalGeneration"
    evaluation = [r for r in read_metrics(second) if "eval_loss" in r][-1]
    assert evaluation["eval_loss"] == pytest.approx(
        [r for r in read_metrics(first) if "eval_loss" in r][-1]["eval_loss"]
    )

    flags = ["--load_experiment", second, "--split", "validation", *data]
    assert evaluate([str(flag) for flag in flags]) == again["validation"]
