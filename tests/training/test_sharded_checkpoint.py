"""A sharded loop (FSDP2) that was killed goes on as if it had not been, on as many ranks or on others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from mpoe import load_mpoe, shard_model
from mpoe.training import find_last_checkpoint, load_sharded_optimizer, save_sharded_checkpoint

from .ranks import torchrun
from .ranks_sharded import SAVED, STEPS, loop
from .tiny import mpoe_model

SCRIPT = Path(__file__).with_name("ranks_sharded.py")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_goes_on_and_what_does_not_fit_is_refused(alone: None, tmp_path: Path) -> None:
    straight = loop(tmp_path)
    assert len(straight) == STEPS
    assert loop(tmp_path) == pytest.approx(straight[SAVED:], rel=1e-6)

    checkpoint = tmp_path / f"checkpoint-{SAVED}"
    assert find_last_checkpoint(tmp_path) == checkpoint
    assert not list(tmp_path.glob(".incomplete*"))
    state = json.loads((checkpoint / "optimizer.json").read_text())
    kept = load_file(checkpoint / "optimizer.safetensors")
    parameters = {name for group in state["groups"] for name in group["params"]}
    # Both steps were masked: a central core has no momentum yet, and must not get any.
    assert {name.rpartition(":")[0] for name in kept} == {name for name in parameters if "central" not in name}
    model = shard_model(load_mpoe(checkpoint))
    with pytest.raises(ValueError, match="optimizer must have the groups of parameters"):
        load_sharded_optimizer(model, torch.optim.AdamW(model.parameters()), checkpoint)
    with pytest.raises(ValueError, match="make it after shard_model"):
        save_sharded_checkpoint(model, torch.optim.AdamW(mpoe_model("t5").parameters()), tmp_path, 3)
    with pytest.raises(TypeError, match="model must be sharded by shard_model"):
        save_sharded_checkpoint(mpoe_model("t5"), torch.optim.AdamW(model.parameters()), tmp_path, 3)
    with pytest.raises(ValueError, match="written by save_sharded_checkpoint"):
        load_sharded_optimizer(model, torch.optim.AdamW(model.parameters()), tmp_path / "checkpoint-9")
    file = checkpoint / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"is damaged: optimizer\.safetensors changed"):
        load_sharded_optimizer(model, torch.optim.AdamW(model.parameters()), checkpoint)


@pytest.mark.slow
def test_a_killed_loop_goes_on_with_any_number_of_ranks(alone: None, tmp_path: Path) -> None:
    one = loop(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "from one")
    killed = torchrun(SCRIPT, tmp_path, "kill")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stdout
    answer = torchrun(SCRIPT, tmp_path)
    assert answer.returncode == 0, answer.stdout
    for rank in range(2):
        two = torch.load(tmp_path / f"rank-{rank}.pt")
        assert two["straight"] == pytest.approx(one, rel=1e-5)
        assert two["killed"] == pytest.approx(two["straight"][SAVED:], rel=1e-5)
        assert two["from one"] == pytest.approx(one[SAVED:], rel=1e-5)
    assert loop(tmp_path / "killed") == pytest.approx(one[SAVED:], rel=1e-5)  # of two ranks, on one
