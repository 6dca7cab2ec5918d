"""A sharded loop (FSDP2) that was killed goes on as if it had not been, on as many ranks or on others."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mpoe import shard_model
from mpoe.training import find_last_checkpoint, load_sharded_optimizer, save_sharded_checkpoint
from mpoe.training.checkpoints import MANIFEST
from tests.assertions import refuses

from .ranks import LOOP_STEPS, SAVED, torchrun
from .ranks import kept_loop as loop
from .tiny import mpoe_model


def seal(checkpoint: Path) -> None:
    """Make a changed checkpoint look as if it had been written so."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name], manifest["crc32"][name] = len(content), zlib.crc32(content)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_goes_on(alone: None, tmp_path: Path) -> None:
    straight = loop(tmp_path)
    assert len(straight) == LOOP_STEPS
    assert loop(tmp_path) == pytest.approx(straight[SAVED:], rel=1e-6)
    assert find_last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{SAVED}"
    assert not list(tmp_path.glob(".incomplete*"))
    kept = torch.load(tmp_path / f"checkpoint-{SAVED}" / "optimizer.pt")
    parameters = {name for group in kept["groups"] for name in group["params"]}
    # Both steps were masked: a central core has no momentum yet, and must not get any.
    assert kept["state"].keys() == {name for name in parameters if "central" not in name}


def test_settings_come_back_as_they_were(alone: None, tmp_path: Path) -> None:
    model = shard_model(mpoe_model("t5"))
    optimizer, again = (torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate)) for rate in (0.5, 0.1))
    optimizer.param_groups[0]["odd"] = ("a", 1)
    for step in (1, 2, 3):
        checkpoint = save_sharded_checkpoint(model, optimizer, tmp_path, step, limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert load_sharded_optimizer(model, again, checkpoint) == 3
    assert (again.param_groups[0]["lr"], again.param_groups[0]["odd"]) == (torch.tensor(0.5), ("a", 1))


def test_what_does_not_fit_is_refused(alone: None, tmp_path: Path) -> None:
    model = shard_model(mpoe_model("t5"))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="model must be sharded by shard_model"):
        save_sharded_checkpoint(mpoe_model("t5"), optimizer, tmp_path, 3)
    with pytest.raises(ValueError, match="make it after shard_model"):
        save_sharded_checkpoint(model, torch.optim.AdamW(mpoe_model("t5").parameters()), tmp_path, 3)
    assert find_last_checkpoint(tmp_path) is None

    checkpoint = save_sharded_checkpoint(model, optimizer, tmp_path, 3)
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    with pytest.raises(ValueError, match="optimizer must have the groups of parameters"):
        load_sharded_optimizer(model, torch.optim.AdamW(groups), checkpoint)
    with pytest.raises(ValueError, match="written by save_sharded_checkpoint"):
        load_sharded_optimizer(model, optimizer, tmp_path / "checkpoint-9")
    file = checkpoint / "optimizer.pt"
    written = file.read_bytes()
    file.write_bytes(written.swapcase())  # of the same size
    damaged = r"checkpoint .*checkpoint-3 is damaged: optimizer\.pt changed"
    refuses(ValueError, damaged, load_sharded_optimizer, model, optimizer, checkpoint)
    seal(checkpoint)
    refuses(ValueError, "checkpoint-3 cannot be read", load_sharded_optimizer, model, optimizer, checkpoint)
    file.write_bytes(written)
    saved = torch.load(file)
    saved["state"]["shared.weight"] = {"exp_avg": torch.ones(3)}
    shape = r"shared\.weight:exp_avg in .* its parameter; got \[3\]"
    for content, message in ((saved, shape), ({}, "cannot be read: 'groups'")):
        torch.save(content, file)
        refuses(ValueError, r"is damaged|is incomplete", load_sharded_optimizer, model, optimizer, checkpoint)
        seal(checkpoint)
        refuses(ValueError, message, load_sharded_optimizer, model, optimizer, checkpoint)


@pytest.mark.slow
def test_a_killed_loop_goes_on_with_any_number_of_ranks(alone: None, tmp_path: Path) -> None:
    one = loop(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "from one")
    killed = torchrun("ranks", tmp_path, "kill")
    assert killed.returncode != 0
    assert "Signal 9 (SIGKILL)" in killed.stdout
    answer = torchrun("ranks", tmp_path, "loop")
    assert answer.returncode == 0, answer.stdout
    for rank in range(2):
        two = torch.load(tmp_path / f"rank-{rank}.pt")
        assert two["straight"] == pytest.approx(one, rel=1e-5)
        assert two["killed"] == pytest.approx(two["straight"][SAVED:], rel=1e-5)
        assert two["from one"] == pytest.approx(one[SAVED:], rel=1e-5)
    assert loop(tmp_path / "killed") == pytest.approx(one[SAVED:], rel=1e-5)  # of two ranks, on one


def test_what_is_no_folder_and_no_step_is_refused(tmp_path: Path) -> None:
    model = mpoe_model("t5")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(TypeError, match="checkpoint must be the folder of one; got NoneType None"):
        load_sharded_optimizer(model, optimizer, None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be sharded by shard_model; got a plain"):  # without a process group
        save_sharded_checkpoint(model, optimizer, tmp_path, 1)
