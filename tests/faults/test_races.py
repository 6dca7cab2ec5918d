"""A slice of the races for a folder, the lock by itself, and the command line beside a run that is going."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from pathlib import Path

import pytest

from mpoe.training import FolderInUseError, prepare_output_dir, run_lock
from mpoe.training.run_lock import LOCK_FILE, check_free, hold

from ..cli.cli_data import write_sentiment
from .kills import command_says
from .processes import Child, fork
from .races import race


def holding(folder: Path) -> Child:
    """A process that holds a folder until it is killed."""

    def work() -> None:
        with hold(folder):
            (folder / "held").touch()
            time.sleep(600)

    child = fork(work, folder.with_name(f"{folder.name}.log"))
    while not (folder / "held").exists():
        assert not child.poll(), child.log.read_text()
        time.sleep(0.001)
    return child


def test_races(tmp_path: Path) -> None:
    tally = race(10, 7, tmp_path)
    assert not tally.problems
    assert tally.told > 10


def test_who_holds_a_folder_is_named_and_a_killed_process_holds_none(tmp_path: Path) -> None:
    folder, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(folder)
    child = holding(folder)
    who = rf"output_dir .*(run|link) is in use by process {child.pid} on {socket.gethostname()}, since 20\d\d-"
    for path in (folder, link):  # by whatever name
        with pytest.raises(FolderInUseError, match=who), hold(path):
            pass
        with pytest.raises(FolderInUseError, match=who):
            check_free(path)
        with pytest.raises(FolderInUseError, match=who):
            prepare_output_dir(path)
    child.kill()
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == child.pid  # the file stays, the lock does not
    check_free(folder)
    with hold(folder), hold(link):  # what a process holds it may hold again
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
        check_free(folder)
    assert not (folder / LOCK_FILE).exists()


def test_children_do_not_keep_the_lock_of_a_process_that_has_ended(tmp_path: Path) -> None:
    def with_a_child() -> None:  # as a process with workers that read data
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


def test_a_lock_that_says_nothing_about_its_holder(tmp_path: Path) -> None:
    child = holding(tmp_path / "run")
    (tmp_path / "run" / LOCK_FILE).write_text("{")
    with pytest.raises(FolderInUseError, match="is in use by another process;"), hold(tmp_path / "run"):
        pass
    child.kill()


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = run_lock._try, []

    def first_too_late(descriptor: int, kind: int) -> bool:
        calls.append(kind)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()  # as its holder does when it ends
        return original(descriptor, kind)

    monkeypatch.setattr(run_lock, "_try", first_too_late)
    with hold(tmp_path):
        assert (tmp_path / LOCK_FILE).exists()
    assert len(calls) == 2


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(run_lock.fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with pytest.warns(UserWarning, match=r"has no locks .*nothing keeps a second process out"), hold(tmp_path):
        pass
    refuse(errno.EIO)
    with pytest.raises(OSError, match=rf"output_dir {tmp_path} cannot be locked"), hold(tmp_path):
        pass
    monkeypatch.setattr(run_lock, "fcntl", None)
    with hold(tmp_path):
        check_free(tmp_path)


@pytest.mark.slow
def test_the_command_line_beside_a_run_that_is_going(tmp_path: Path) -> None:
    data, folder = write_sentiment(tmp_path / "data"), tmp_path / "run"
    words = f"train --model t5 --data_dir {data} --output_dir {folder} --num_experts 2 --use_cpu".split()
    words += ["--per_device_train_batch_size", "2", "--save_steps", "5", "--disable_tqdm", "true"]

    def run() -> None:
        command_says([*words, "--max_steps", "100000"], tmp_path / "live.log")

    child = fork(run, tmp_path / "fork.log")
    end = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoint-*")):
        assert time.monotonic() < end, (tmp_path / "live.log").read_text()
        time.sleep(0.05)
    holder = json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"]
    for more in (["--resume", "--max_steps", "100000"], ["--overwrite"], []):
        code, said = command_says([*words, *more], tmp_path / f"{len(more)}.log")
        assert code == 2
        assert f"is in use by process {holder} on" in said
    os.kill(holder, 9)
    child.wait()
