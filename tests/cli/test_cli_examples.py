"""Every file in examples/ runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run_example(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def test_drop_in(tmp_path: Path) -> None:
    out = run_example("drop_in.py", tmp_path / "model")
    assert "central:" in out
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_plain_loop() -> None:
    out = run_example("plain_loop.py", 3)
    assert "auxiliary" in out
    assert "step 2: loss" in out


@pytest.mark.parametrize(
    ("name", "data"), [("train_t5_movie_sentiment.yaml", "sentiment"), ("train_gpt2_austen.yaml", "prose")]
)
def test_configurations(cli, request: pytest.FixtureRequest, tmp_path: Path, name: str, data: str) -> None:
    folder = request.getfixturevalue(data)
    flags = ["--data_dir", folder, "--output_dir", tmp_path / "run", "--max_steps", 1, "--num_experts", 2]
    flags += ["--per_device_train_batch_size", 2, "--max_source_length", 16, "--use_cpu"]
    answer = cli("train", EXAMPLES / name, *flags)
    assert answer.code == 0, answer.err
    assert (tmp_path / "run" / "results.json").is_file()


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.name)
def test_paths_of_configurations_are_relative(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert not Path(values["data_dir"]).is_absolute()
    assert not Path(values["output_dir"]).is_absolute()
