"""Killed runs, full disks, folders that cannot be written, memory: slow in a slice, exhaustive at
length."""

import gc
import os
import signal

import numpy as np
import pytest
import torch

from mpoe import (
    MPOEConfig,
    collect_statistics,
    convert_to_mpoe,
    load_expert,
    load_mpoe,
    save_expert,
    start_expert,
)
from mpoe.cli import train
from mpoe.data.stand_in_models import load_stand_in
from mpoe.training.published import finish
from tests.assertions import in_threads, refuses
from tests.models.tiny_models import tiny_model
from tests.training.tiny import Rows, dense_model, make_trainer, mpoe_model, resume_options

from .processes import SEED, command_says, full_disk, kill_runs, resident_bytes, straight_run

slow, exhaustive = pytest.mark.slow, pytest.mark.exhaustive


@pytest.mark.parametrize("count", [pytest.param(3, marks=slow), pytest.param(50, marks=exhaustive)])
def test_killed_runs_go_on_to_the_same_weights(tmp_path, count):
    tally = kill_runs(count, SEED, tmp_path)
    print(f"{dict(tally)}: all runs resumed to the same weights")
    assert tally["killed"] == count


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((0.0, 1.01), marks=slow),
        pytest.param([2 * number / 5 for number in range(6)], marks=exhaustive),
    ],
)
def test_full_disk_loses_nothing(tmp_path, sizes):
    """By what the weights take: before the first checkpoint, with room for them and not for the
    optimizer's state."""
    expected = straight_run(tmp_path)
    room = (tmp_path / "straight/model.safetensors").stat().st_size
    for size in sizes:
        full_disk(tmp_path, 1 + int(size * room), expected)


TRAIN = """train --data_dir {0} --expert a --neurons 64 --output_dir {0}/out --model gpt2
--max_steps 1 --learning_rate 1e-3 --max_source_length 16 --use_cpu --save_strategy no"""
COMMANDS = {
    "convert": "convert t5 {0}/out --num_experts 2",
    "compose": "compose gpt2 {0}/law.expert --output_dir {0}/out --background {0}/train.txt",
    "export": "export {0}/mixture {0}/out --to granitemoeshared",
    "train": TRAIN,
}


@pytest.mark.parametrize(
    "options", [{"size": 20_000}, {"as_user": True}], ids=["full", "read_only"]
)
@pytest.mark.parametrize(
    "command", ["convert", *(pytest.param(name, marks=slow) for name in list(COMMANDS)[1:])]
)
def test_command_line_tells_of_the_disk_in_one_line(tmp_path, command, options):
    out = tmp_path / "out"
    if "as_user" in options:
        out.mkdir(mode=0o555)
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text("A list holds its items in their order.\n\n" * 60)
    if command == "compose":
        expert = start_expert(load_stand_in("gpt2")[0], 64)
        ids = torch.arange(64).view(4, 16)
        save_expert(
            expert,
            tmp_path / "law.expert",
            statistics=collect_statistics(expert, [{"input_ids": ids}]),
        )
    elif command == "export":
        tiny = tiny_model("llama", "LlamaForCausalLM", vocab_size=2048)
        convert_to_mpoe(
            tiny, MPOEConfig(num_experts=2, shape="neurons", neurons=8)
        ).save_pretrained(tmp_path / "mixture")
        load_stand_in("gpt2")[1].save_pretrained(tmp_path / "mixture")
    words = COMMANDS[command].format(tmp_path).split()
    code, text = command_says(words, tmp_path / "log", **options)
    assert code == 2, text
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line.startswith("mpoe: error: ")]
    assert len(lines) == 1
    assert ("cannot be" if "as_user" in options else "large") in lines[0]
    assert str(out) in lines[0]
    left = [
        path
        for path in out.rglob("*")
        if path.suffix in (".expert", ".safetensors") or command != "train"
    ]
    assert [path for path in left if ".incomplete-model" not in path.parts] == []


ENDS = {  # of a run that replaces another, in their order: where it is killed
    "a step": "mpoe.training.trainer.MPOETrainer.training_step",
    "the statistics": "mpoe.cli.expert.collect_statistics",
    "the files": "mpoe.training.published.sync_tree",
    "the exchange": "mpoe.training.published._finish",
    "the results": "mpoe.cli.train.write_json",
}


def folder_of_a_run(folder):
    """Beside texts to train on."""
    for split in ("train", "validation"):
        (folder / f"{split}.txt").write_text("A list holds its items in their order.\n\n" * 12)
    run = folder / "out"
    run.mkdir()
    return run


@pytest.mark.parametrize(
    "point", [name if name == "the exchange" else pytest.param(name, marks=slow) for name in ENDS]
)
def test_a_killed_run_leaves_the_earlier_expert_or_its_own(tmp_path, monkeypatch, point):
    run = folder_of_a_run(tmp_path)
    save_expert(start_expert(load_stand_in("gpt2")[0], 8), run / "a.expert")
    for name, text in {
        "background.safetensors": "old",
        "mpoe_files.json": '{"files": ["a.expert", "b.expert"]}',
        "b.expert": "old",
        "run.json": '{"config": {}}',
    }.items():
        (run / name).write_text(text)
    (run / "checkpoint-9").mkdir()
    earlier = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    del earlier["run.json"]
    monkeypatch.setattr(ENDS[point], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    words = f"{TRAIN.format(tmp_path)} --overwrite".split()
    code, text = command_says(words, tmp_path / "log")
    assert code == -signal.SIGKILL, text
    if point != "the results":
        assert {name: (run / name).read_bytes() for name in earlier} == earlier
        assert not (run / "checkpoint-9").exists()
        assert load_expert(run / "a.expert").neurons == 8
    monkeypatch.undo()
    finish(run)
    is_new = point in ("the exchange", "the results")
    assert load_expert(run / "a.expert").neurons == (64 if is_new else 8)
    assert (run / "b.expert").exists() is not is_new
    assert (run / "background.safetensors").read_text() == "old"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch):
    run = folder_of_a_run(tmp_path)
    (run / "mpoe_files.json").write_text('{"files": ["b.expert"]}')
    (run / "b.expert").write_text("earlier")
    make = train.make_trainer

    def late(*arguments):
        (run / "a.expert").write_text("mine")
        return make(*arguments)

    monkeypatch.setattr(train, "make_trainer", late)
    _, *words = f"{TRAIN.format(tmp_path)} --overwrite".split()
    refuses(FileExistsError, r"did not write .*out/a\.expert", train.command, words)
    assert (run / "a.expert").read_text() == "mine"
    assert (run / "b.expert").read_text() == "earlier"


def test_loads_and_conversions_in_threads(tmp_path):
    dense, model = dense_model("gpt2"), mpoe_model("t5")
    model.save_pretrained(tmp_path)
    expected = [
        model.state_dict(),
        convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable")).state_dict(),
    ]

    def work(number):
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
        assert all(
            torch.equal(got[name], wanted[name])
            for name in wanted
            if name not in routers or number % 2 == 0
        )
        assert not any(value.is_meta for value in got.values())
    assert torch.get_default_dtype() == torch.float32
    assert not torch.empty(1).is_meta


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_same_seed_same_bits(tmp_path, family):
    """Six steps with dropout, jitter and the gradient mask, twice in one process, once with forked
    readers of data."""
    finals, losses = [], []
    for workers in (0, 2):
        torch.manual_seed(workers)  # whatever state the process is in
        options = resume_options(family, 6) | {
            "dataloader_num_workers": workers,
            "save_strategy": "no",
        }
        trainer = make_trainer(tmp_path / str(workers), **options)
        trainer.train()
        finals.append(trainer.model.state_dict())
        losses.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert losses[0] == losses[1]
    assert all(torch.equal(finals[1][name], value) for name, value in finals[0].items())


def count_tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "steps, warm, most",
    [pytest.param(150, 50, 20_000, marks=slow), pytest.param(1000, 200, 2_000, marks=exhaustive)],
)
def test_memory_stays_flat(steps, warm, most):
    """Bytes per step by least squares; batches change their sizes, and the first ``warm`` ones fill
    caches."""
    model = mpoe_model("t5", dropout=0.1, jitter=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rows, samples, tensors = Rows("t5").rows, [], 0
    for step in range(steps):
        picked = [rows[(step + k) % len(rows)] for k in range(1 + step % 8)]
        batch = {name: torch.stack([row[name] for row in picked]) for name in picked[0]}
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        if step == warm - 1:
            tensors = count_tensors()
        if step >= warm:
            samples.append(resident_bytes())
    slope, new = (
        float(np.polyfit(np.arange(len(samples)), samples, 1)[0]),
        count_tensors() - tensors,
    )
    print(f"{slope:+.0f} bytes per step, {new:+d} tensors")
    assert slope < most
    assert new <= 0
