"""Processes that start in one folder at once, or continue a run that is still going: one is in, the
others are told.

Whoever is in makes a folder `inside` and removes it when it leaves, so that two at once cannot go
unnoticed.
"""

import errno
import os
import random
import socket
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from mpoe.training import FolderInUseError, checkpoints, prepare_output_dir, run_lock
from mpoe.training.run_lock import LOCK_FILE, check_free, hold
from tests.assertions import read_json, refuses
from tests.training.tiny import make_trainer

from ..cli.cli_data import words, write_sentiment
from .processes import SEED, command_says, fork

TOLD, LATE, TWO_INSIDE = (
    3,
    4,
    5,
)  # exit statuses: refused while one is in, refused after it, and what must not be


class Inside(TrainerCallback):
    """Marks the time in which a Trainer trains."""

    def on_train_begin(self, args, state, control, **kwargs):
        enter(Path(args.output_dir))

    def on_train_end(self, args, state, control, **kwargs):
        (Path(args.output_dir) / "inside").rmdir()


def enter(folder):
    try:
        (folder / "inside").mkdir()
    except FileExistsError:
        os._exit(TWO_INSIDE)


def claim(folder, seconds, resume=False, overwrite=False):
    """A run as the command line does it: hold, claim, work, leave."""
    with hold(folder):
        prepare_output_dir(folder, overwrite, resume, {"steps": 1})
        enter(folder)
        time.sleep(seconds)
        (folder / "inside").rmdir()


def train(folder):
    """A run of the library: the Trainer alone."""
    torch.set_num_threads(1)
    make_trainer(folder, max_steps=1, callbacks=[Inside()]).train()


def live(folder, go_on):
    """A run in the middle of a save; it ends when ``go_on`` is closed and its files are as it wrote
    them."""
    with hold(folder):
        prepare_output_dir(folder, run_config={"steps": 1})
        staged = checkpoints.staging_root(folder) / "checkpoint-1"
        staged.mkdir(parents=True)
        (staged / "weights").write_text("half of th")
        enter(folder)
        os.read(go_on, 1)
        assert (staged / "weights").read_text() == "half of th"
        checkpoints.publish(staged, folder)
        staged.parent.rmdir()
        (folder / "inside").rmdir()


def told(work):
    """``work``, whose refusals are exit statuses."""

    def run():
        try:
            work()
        except FolderInUseError as error:
            print(error)
            raise SystemExit(TOLD) from error
        except ValueError as error:
            print(error)
            raise SystemExit(LATE if "holds another run" in str(error) else 1) from error

    return run


def at_once(works, folder):
    """Fork all of them, and let them go at the same moment."""
    ready, go = os.pipe()

    def waiting(work):
        def run():
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes its end
            told(work)()

        return run

    children = [
        fork(waiting(work), folder.with_name(f"{folder.name}-{i}.log"))
        for i, work in enumerate(works)
    ]
    os.close(ready)
    os.close(go)
    return children


def said_by(*children):
    return " | ".join(child.log.read_text()[-300:] for child in children)


def double_start(folder, draw, tally):
    """Two to four starts at once; some replace an earlier run."""
    overwrite = draw.random() < 0.3
    if overwrite:
        prepare_output_dir(folder, run_config={"steps": 0})
    times = [draw.choice([0.0, 0.002, 0.05]) for _ in range(draw.randint(2, 4))]
    children = at_once([partial(claim, folder, t, overwrite=overwrite) for t in times], folder)
    # Who comes after the first has left may replace its run, if it was told to.
    judge(children, tally, most=len(times) if overwrite else 1)


def double_training(folder, draw, tally):
    """Two Trainers at once; who comes late trains after the first, never beside it."""
    judge(at_once([partial(train, folder)] * 2, folder), tally, most=2)


def resume_of_live(folder, draw, tally):
    """Three processes want to continue, or to replace, a run that is still going; it may then be
    killed."""
    waiting, go_on = os.pipe()

    def work():
        os.close(go_on)
        live(folder, waiting)

    holder = fork(work, folder.with_name(f"{folder.name}-live.log"))
    os.close(waiting)
    while not (folder / "inside").is_dir() and holder.is_alive():
        time.sleep(0.001)
    wishes = [
        draw.choice([{"resume": True}, {"resume": True}, {"overwrite": True}, {}]) for _ in range(3)
    ]
    others = at_once([partial(claim, folder, 0.0, **wish) for wish in wishes], folder)
    for child in others:
        assert child.wait(60) == TOLD, said_by(child)
        assert f"process {holder.pid} on " in said_by(child)
    killed = draw.random() < 0.5
    if killed:
        holder.kill()
        (folder / "inside").rmdir()
    os.close(go_on)
    assert holder.wait(60) == (-9 if killed else 0), said_by(holder)
    # Whatever became of it, nothing stands in the way of the next one.
    again = fork(
        told(partial(claim, folder, 0.0, resume=True)), folder.with_name(f"{folder.name}-again.log")
    )
    assert again.wait(60) == 0, said_by(again)
    tally.update(processes=5, entered=2, told=3)


def judge(children, tally, most):
    """One to ``most`` got in; nobody met another inside; the rest were told."""
    statuses = [child.wait(120) for child in children]
    entered = statuses.count(0)
    assert set(statuses) <= {0, TOLD, LATE}, said_by(*children)
    assert 1 <= entered <= most, said_by(*children)
    tally.update(processes=len(children), entered=entered, told=len(children) - entered)


@pytest.mark.parametrize(
    "races, seed",
    [(5, 7), pytest.param(200, SEED, marks=pytest.mark.exhaustive)],
    ids=["a slice", "at length"],
)
def test_races(tmp_path, races, seed):
    """Four of ten are double starts, four resumes of a live run, two of Trainers."""
    draw, tally = random.Random(seed), Counter()
    kinds = [double_start, resume_of_live, double_start, resume_of_live, double_training]
    for number in range(races):
        folder = tmp_path / f"race-{number}"
        kinds[number % len(kinds)](folder, draw, tally)
        assert not (folder / LOCK_FILE).exists(), "a lock was left behind"
    print(f"{races} races: {dict(tally)}")
    assert tally["told"] > races


# ------------------------------------------------------------------ the lock by itself


def holding(folder):
    """A process that holds a folder until it is killed."""

    def work():
        with hold(folder):
            (folder / "held").touch()
            time.sleep(600)

    child = fork(work, folder.with_name(f"{folder.name}.log"))
    while not (folder / "held").exists():
        assert child.is_alive(), child.log.read_text()
        time.sleep(0.001)
    return child


def test_who_holds_a_folder_is_named_and_a_killed_process_holds_none(tmp_path):
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)
    child = holding(folder)
    who = (
        f"output_dir .*(run|link) is in use by process {child.pid} on {socket.gethostname()}, "
        r"since 20\d\d-"
    )
    for path in (folder, link):  # by whatever name
        with pytest.raises(FolderInUseError, match=who), hold(path):
            pass
        refuses(FolderInUseError, who, check_free, path)
        refuses(FolderInUseError, who, prepare_output_dir, path)
    child.kill()
    assert read_json(folder / LOCK_FILE)["pid"] == child.pid  # the file stays, the lock does not
    check_free(folder)
    with hold(folder), hold(link):  # what a process holds it may hold again
        assert read_json(folder / LOCK_FILE)["pid"] == os.getpid()
        check_free(folder)
    assert not (folder / LOCK_FILE).exists()


def test_children_do_not_keep_the_lock_of_a_process_that_has_ended(tmp_path):
    def with_a_child():  # as a process with workers that read data
        with hold(tmp_path / "run"):
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            (tmp_path / "forked").touch()
            time.sleep(600)

    child = fork(with_a_child, tmp_path / "log")
    while not (tmp_path / "forked").exists():
        time.sleep(0.001)
    child.kill()
    with hold(tmp_path / "run"):
        pass


def test_a_lock_that_says_nothing_about_its_holder(tmp_path):
    child = holding(tmp_path / "run")
    (tmp_path / "run" / LOCK_FILE).write_text("{")
    with (
        pytest.raises(FolderInUseError, match="is in use by another process;"),
        hold(tmp_path / "run"),
    ):
        pass
    child.kill()


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(tmp_path, monkeypatch):
    original, calls = run_lock._try, []

    def first_too_late(descriptor, kind):
        calls.append(kind)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()  # as its holder does when it ends
        return original(descriptor, kind)

    monkeypatch.setattr(run_lock, "_try", first_too_late)
    with hold(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert len(calls) == 2


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def refuse(code):
        def flock(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(run_lock.fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with (
        pytest.warns(UserWarning, match=r"has no locks .*nothing keeps a second process out"),
        hold(tmp_path),
    ):
        pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match=rf"output_dir {tmp_path} cannot be locked"), hold(tmp_path):
        pass
    monkeypatch.setattr(run_lock, "fcntl", None)
    with hold(tmp_path):
        check_free(tmp_path)


@pytest.mark.slow
def test_the_command_line_beside_a_run_that_is_going(tmp_path):
    data, folder = write_sentiment(tmp_path / "data"), tmp_path / "run"
    line = f"train --model t5 --data_dir {data} --output_dir {folder} --num_experts 2 --use_cpu"
    line += " --per_device_train_batch_size 2 --save_steps 5 --disable_tqdm true"
    long = "--max_steps 100000"

    def run():
        command_says(words(line, long), tmp_path / "live.log")

    child = fork(run, tmp_path / "fork.log")
    end = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < end, (tmp_path / "live.log").read_text()
        time.sleep(0.05)
    holder = read_json(tmp_path / "run" / LOCK_FILE)["pid"]
    for more in (f"--resume {long}", "--overwrite", ""):
        code, said = command_says(words(line, more), tmp_path / f"{len(more)}.log")
        assert code == 2
        assert f"is in use by process {holder} on" in said
    os.kill(holder, 9)
    child.wait()
