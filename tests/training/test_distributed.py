"""Two processes (gloo, by torchrun) do what one does; a sharded loop (FSDP2) that was killed goes
on."""

import json
import re
import shutil
import zlib

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.testing import assert_close

from mpoe import load_mpoe, shard_model
from mpoe.training import find_last_checkpoint, load_sharded_optimizer, save_sharded_checkpoint
from mpoe.training.checkpoints import MANIFEST
from tests.assertions import differing, refuses

from .ranks import LOOP_STEPS, MORE_RUNS, RUNS, SAVED, by_trainer, run, torchrun
from .ranks import kept_loop as loop
from .tiny import Rows, arguments, dense_model, mpoe_model

FIRST = "trainer"
# bfloat16 products round the sums of a whole batch and of its halves differently.
BFLOAT16 = 5e-3


def tolerance(name):
    return BFLOAT16 if "bfloat16" in name or "autocast" in name else 1e-5


def continue_from(checkpoint, folder):
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint, folder / checkpoint.name)


def check_alike(name, one, ranks):
    """Losses within 1e-5, masks and what they spare bit for bit, weights of both ranks
    identical."""
    relative = tolerance(name)
    for other in ranks:
        assert other["losses"] == pytest.approx(one["losses"], rel=relative), name
        assert other["masked"] == one["masked"], name
        # In a masked step no central core changes, on both ranks; in others all do.
        assert other["moved"] == one["moved"], name
        every = one["centrals"]
        assert one["moved"] == [set() if masked else every for masked in one["masked"]], name
    assert [rank.get("loads") for rank in ranks] == [one.get("loads")] * 2, name
    for parameter, value in ranks[0].get("weights", {}).items():
        assert torch.equal(value, ranks[1]["weights"][parameter]), (name, parameter)
        assert_close(value, one["weights"][parameter], rtol=1e-3, atol=10 * relative)


def do_both(names, folder):
    """The runs in this process and in two, compared; returns one process's results and those of
    both ranks."""
    one = {name: run(name, folder / "one", 1) for name in names}
    if FIRST in one:
        continue_from(folder / "one" / FIRST / "checkpoint-2", folder / "resume")
    answer = torchrun("ranks", folder, *names)
    assert answer.returncode == 0, answer.stdout
    ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]
    for name in names:
        check_alike(name, one[name], [rank[name] for rank in ranks])
        if "logits" in one[name]:
            check_saved(
                folder / "two" / name,
                ranks[0][name]["logits"],
                one[name]["logits"],
                tolerance(name),
            )
    return [one, *ranks]


def check_saved(folder, sharded, alone, relative):
    """What FSDP2 gathered loads as ever, and computes the same."""
    loaded = load_mpoe(folder)
    family = "gpt2" if "GPT2" in type(loaded).__name__ else "t5"
    inputs = {key: value[None] for key, value in Rows(family, rows=1)[0].items()}
    with torch.no_grad():
        logits = loaded(**inputs).logits
    assert type(loaded) is type(mpoe_model(family))
    assert_close(logits, sharded.float(), rtol=0, atol=1e-5 if relative < BFLOAT16 else 0.1)
    assert_close(logits, alone, rtol=0, atol=1e-4 if relative < BFLOAT16 else 0.1)


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    one, *ranks = do_both(RUNS, tmp_path)
    assert {True, False} == set(one[FIRST]["masked"])

    # A checkpoint of one process continues on two, and one of two on one.
    straight = one[FIRST]["losses"]
    assert [rank["resumed"]["losses"] for rank in ranks] == [pytest.approx(straight, rel=1e-5)] * 2
    continue_from(tmp_path / "two" / FIRST / "checkpoint-2", tmp_path / "back")
    assert by_trainer(tmp_path / "back", 1, "t5", {}, resume=True)["losses"] == pytest.approx(
        straight, rel=1e-5
    )

    # What one rank alone sees ends both at the same step.
    assert [rank["diverged"]["step"] for rank in ranks] == [2, 2]
    assert "the loss is inf" in ranks[0]["diverged"]["message"]

    # The mean of the ranks' own router losses is another number.
    assert ranks[0]["own router losses"]["aux_losses"][0] > one[FIRST]["aux_losses"][0] * (1 + 1e-4)


@pytest.mark.exhaustive
def test_more_runs_of_two_ranks_equal_one_process(tmp_path):
    do_both(MORE_RUNS, tmp_path)


def test_fsdp_of_the_trainer_is_refused_where_it_would_be_ddp(tmp_path):
    refuses(ValueError, r"fsdp must be off on a CPU.*shard_model", arguments, tmp_path, fsdp=True)


def test_sharding_is_refused_without_a_process_group_or_mixture():
    refuses(RuntimeError, "needs a process group", shard_model, mpoe_model("gpt2"))
    refuses(TypeError, "must be an MPOE model", shard_model, dense_model("gpt2"))
    model = mpoe_model("t5")
    optimizer = torch.optim.AdamW(model.parameters())
    refuses(
        TypeError,
        "checkpoint must be the folder of one; got None",
        load_sharded_optimizer,
        model,
        optimizer,
        None,
    )


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_run_continues(tmp_path):
    """The launcher notices, says which rank and stops the other; the same command goes on to the
    same weights."""
    straight = torchrun("tiny", tmp_path / "straight", "t5", 8, "never")
    assert straight.returncode == 0, straight.stdout
    killed = torchrun("tiny", tmp_path / "run", "t5", 8, "step-5", timeout=120)
    assert killed.returncode not in (0, None)
    assert re.search(r"rank\s*: 1 .*\n\s*exitcode\s*: -9", killed.stdout), killed.stdout
    assert "Signal 9 (SIGKILL)" in killed.stdout
    assert find_last_checkpoint(tmp_path / "run") == tmp_path / "run/checkpoint-3"
    resumed = torchrun("tiny", tmp_path / "run", "t5", 8, "never", "resume")
    assert resumed.returncode == 0, resumed.stdout
    expected, found = (torch.load(tmp_path / name / "final.pt") for name in ("straight", "run"))
    assert not differing(expected, found)


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(tmp_path):
    """Neurons and hidden-side experts under DDP, FSDP2 and tensor parallelism."""
    answer = torchrun("ranks", tmp_path, "kept")
    assert answer.returncode == 0, answer.stdout


# ------------------------------------------------------------------ sharded loops


def seal(checkpoint):
    """Make a changed checkpoint look as if it had been written so."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name], manifest["crc32"][name] = len(content), zlib.crc32(content)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_one_rank_goes_on(alone, tmp_path):
    straight = loop(tmp_path)
    assert len(straight) == LOOP_STEPS
    assert loop(tmp_path) == pytest.approx(straight[SAVED:], rel=1e-6)
    assert find_last_checkpoint(tmp_path) == tmp_path / f"checkpoint-{SAVED}"
    assert not list(tmp_path.glob(".incomplete*"))
    with safe_open(
        tmp_path / f"checkpoint-{SAVED}" / "optimizer.safetensors", framework="pt"
    ) as file:
        kept = {name.rpartition(":")[0] for name in file.keys()}  # noqa: SIM118
        parameters = {
            name for group in json.loads(file.metadata()["groups"]) for name in group["params"]
        }
    # Both steps were masked: a central core has no momentum yet, and must not get any.
    assert kept == {name for name in parameters if "central" not in name}


def test_settings_come_back_as_they_were(alone, tmp_path):
    model = shard_model(mpoe_model("t5"))
    optimizer, again = (
        torch.optim.AdamW(model.parameters(), lr=torch.tensor(rate)) for rate in (0.5, 0.1)
    )
    optimizer.param_groups[0]["odd"] = ("a", 1)
    for step in (1, 2, 3):
        checkpoint = save_sharded_checkpoint(model, optimizer, tmp_path, step, limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    assert load_sharded_optimizer(model, again, checkpoint) == 3
    assert (again.param_groups[0]["lr"], again.param_groups[0]["odd"]) == (
        torch.tensor(0.5),
        ("a", 1),
    )


def test_what_does_not_fit_a_sharded_checkpoint(alone, tmp_path):
    model = shard_model(mpoe_model("t5"))
    optimizer = torch.optim.AdamW(model.parameters())
    refuses(
        TypeError,
        "model must be sharded by shard_model; got a plain",
        save_sharded_checkpoint,
        mpoe_model("t5"),
        optimizer,
        tmp_path,
        3,
    )
    refuses(
        ValueError,
        "make it after shard_model",
        save_sharded_checkpoint,
        model,
        torch.optim.AdamW(mpoe_model("t5").parameters()),
        tmp_path,
        3,
    )
    optimizer.param_groups[0]["odd"] = object()
    refuses(
        TypeError,
        "settings of optimizer must be numbers, texts or lists of them; got object",
        save_sharded_checkpoint,
        model,
        optimizer,
        tmp_path,
        3,
    )
    del optimizer.param_groups[0]["odd"]
    assert find_last_checkpoint(tmp_path) is None

    checkpoint = save_sharded_checkpoint(model, optimizer, tmp_path, 3)
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    refuses(
        ValueError,
        "optimizer must have the groups of parameters",
        load_sharded_optimizer,
        model,
        torch.optim.AdamW(groups),
        checkpoint,
    )
    refuses(
        ValueError,
        "written by save_sharded_checkpoint",
        load_sharded_optimizer,
        model,
        optimizer,
        tmp_path / "checkpoint-9",
    )
    file = checkpoint / "optimizer.safetensors"
    written = file.read_bytes()
    file.write_bytes(written.swapcase())  # of the same size
    damaged = r"checkpoint .*checkpoint-3 is damaged: optimizer\.safetensors changed"
    refuses(ValueError, damaged, load_sharded_optimizer, model, optimizer, checkpoint)
    seal(checkpoint)
    refuses(
        ValueError,
        "checkpoint-3 cannot be read",
        load_sharded_optimizer,
        model,
        optimizer,
        checkpoint,
    )
    file.write_bytes(written)
    with safe_open(file, framework="pt") as opened:
        settings = opened.metadata()
    shape = r"shared\.weight:exp_avg in .* its parameter; got \[3\]"
    for metadata, message in ((settings, shape), (None, "cannot be read: 'groups'")):
        save_file({"shared.weight:exp_avg": torch.ones(3)}, file, metadata=metadata)
        refuses(
            ValueError,
            r"is damaged|is incomplete",
            load_sharded_optimizer,
            model,
            optimizer,
            checkpoint,
        )
        seal(checkpoint)
        refuses(ValueError, message, load_sharded_optimizer, model, optimizer, checkpoint)


@pytest.mark.slow
def test_a_killed_loop_goes_on_with_any_number_of_ranks(alone, tmp_path):
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
