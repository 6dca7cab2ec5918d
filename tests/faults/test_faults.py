"""A slice of what `test_at_length.py` does: killed runs, full disks, folders that cannot be written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mpoe import MPOEConfig, convert_to_mpoe, load_mpoe
from mpoe.training import find_last_checkpoint
from tests.assertions import in_threads
from tests.training.tiny import dense_model, make_trainer, mpoe_model, resume_options

from . import kills, memory
from .kills import command_says, full_disk, straight_run
from .processes import fork


@pytest.mark.slow
def test_killed_runs_go_on_to_the_same_weights(tmp_path: Path) -> None:
    tally = kills.kill_runs(3, seed=0, folder=tmp_path)
    assert tally.problems == []
    assert tally.kills == 3


@pytest.mark.slow
def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Full before the first checkpoint, and with room for the weights but not for the optimizer's state."""
    expected = straight_run(tmp_path)
    room = (tmp_path / "straight" / "model.safetensors").stat().st_size
    for size in (10_000, room + 1000):
        assert full_disk(tmp_path, size, expected) == []


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """400 KiB hold one checkpoint; with more room the run goes on from it."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        assert fork(lambda: kills.victim(disk / "run"), log).wait() == 1
        assert "No space left on device" in log.read_text()
        assert kills.what_is_wrong(disk / "run", None) == []
        assert find_last_checkpoint(disk / "run") == disk / "run" / "checkpoint-3"
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert fork(lambda: kills.victim(disk / "run"), log).wait() == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("options", [{"size": 20_000}, {"as_user": True}], ids=["full", "read_only"])
def test_command_line_tells_of_the_disk_in_one_line(tmp_path: Path, options: dict) -> None:
    out = tmp_path / "out"
    if "as_user" in options:
        out.mkdir(mode=0o555)
    code, text = command_says(["convert", "t5", str(out), "--num_experts", "2"], tmp_path / "log", **options)
    assert code == 2, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("mpoe: error: ")]
    assert len(lines) == 1
    assert ("cannot be" if "as_user" in options else "large") in lines[0]
    assert str(out) in lines[0]
    assert list(out.glob("*")) == []


def test_loads_and_conversions_in_threads(tmp_path: Path) -> None:
    dense, model = dense_model("gpt2"), mpoe_model("t5")
    model.save_pretrained(tmp_path)
    expected = [model.state_dict(), convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable")).state_dict()]

    def work(number: int) -> dict[str, torch.Tensor]:
        for _ in range(3):
            made = (
                load_mpoe(tmp_path)
                if number % 2 == 0
                else convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable"))
            )
        return made.state_dict()

    for number, got in enumerate(in_threads(6, work)):
        wanted = expected[number % 2]
        assert got.keys() == wanted.keys()
        routers = [name for name in wanted if "router" in name]  # of a conversion they are random
        assert all(torch.equal(got[name], wanted[name]) for name in wanted if name not in routers or number % 2 == 0)
        assert not any(value.is_meta for value in got.values())
    assert torch.get_default_dtype() == torch.float32
    assert not torch.empty(1).is_meta


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_same_seed_same_bits(tmp_path: Path, family: str) -> None:
    """Six steps with dropout, jitter and the gradient mask, twice in one process, once with forked readers of data."""
    finals, losses = [], []
    for workers in (0, 2):
        torch.manual_seed(workers)  # whatever state the process is in
        options = resume_options(family, 6) | {"dataloader_num_workers": workers, "save_strategy": "no"}
        trainer = make_trainer(tmp_path / str(workers), **options)
        trainer.train()
        finals.append(trainer.model.state_dict())
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1]
    assert all(torch.equal(finals[1][name], value) for name, value in finals[0].items())


@pytest.mark.slow
def test_memory_stays_flat() -> None:
    assert memory.growth(steps=150, warm=50).bytes_per_step < 20_000
