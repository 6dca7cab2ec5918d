"""The guard of the output folder, the checkpoints' completeness and the metrics file."""

import errno
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from mpoe.training import checkpoints, prepare_output_dir, read_metrics
from mpoe.training.output_dir import (
    METRICS_FILE,
    RUN_FILE,
    check_folder,
    check_output_dir,
    checkpoint_to_resume,
    write_metrics,
)
from mpoe.training.run_lock import hold
from mpoe.training.run_log import load_shares, load_summary
from tests.assertions import refuses

CONFIG = {
    "seed": 1,
    "train": {"logging_steps": 5},
    "mpoe": {"num_experts": 8, "shape": "separable"},
    "tasks": ("a", "b"),
    "output_dir": "x",
}


def make_checkpoint(run_dir, step):
    staged = checkpoints.staging_root(run_dir) / f"checkpoint-{step}"
    (staged / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(step)}, staged / "model.safetensors")
    (staged / "sub/state.bin").write_bytes(b"state")
    (staged / "optimizer.pt").touch()
    final = checkpoints.publish(staged, run_dir)
    staged.parent.rmdir()
    return final


@pytest.mark.parametrize(
    "sign, said",
    [
        *(
            (name, "another run; continue it with --resume")
            for name in ("metrics.jsonl", "checkpoint-5/", RUN_FILE)
        ),
        *(
            (name, "a saved model or results")
            for name in ("config.json", "model.safetensors", "results.json")
        ),
    ],
)
def test_what_counts_as_a_run(tmp_path, sign, said):
    file = tmp_path / sign
    file.mkdir() if sign.endswith("/") else file.touch()
    before = [path.stat().st_mtime_ns for path in (tmp_path, file)]
    refuses(
        ValueError,
        rf"holds {said}.* delete (it|them) with --overwrite",
        prepare_output_dir,
        tmp_path,
        run_config=CONFIG,
    )
    assert before == [path.stat().st_mtime_ns for path in (tmp_path, file)]
    assert list(tmp_path.iterdir()) == [file]
    if sign.endswith("s.json"):
        refuses(
            ValueError,
            "nothing to resume",
            prepare_output_dir,
            tmp_path,
            resume=True,
            run_config=CONFIG,
        )
    prepare_output_dir(tmp_path, overwrite=True, run_config=CONFIG)
    assert os.listdir(tmp_path) == [RUN_FILE]
    if not sign.endswith("/"):
        file.touch()  # as the end of a run leaves a model
        assert prepare_output_dir(tmp_path, resume=True, run_config=CONFIG) is None


def test_foreign_files_are_no_run_and_survive_overwrite(tmp_path):
    for name in ("checkpoint-of-my-own", ".mine"):
        (tmp_path / name).mkdir()
    for name in ("notes.txt", "mine.safetensors", "checkpoint-7", "checkpoint-notes.txt"):
        (tmp_path / name).write_text("mine")
    mine = set(os.listdir(tmp_path))
    prepare_output_dir(tmp_path, run_config=CONFIG)
    make_checkpoint(tmp_path, 3)
    (tmp_path / "model.safetensors").touch()
    write_metrics(tmp_path, {"step": 1})
    (tmp_path / ".incomplete-checkpoints/checkpoint-4").mkdir(parents=True)
    (tmp_path / ".deleting-checkpoint-1").mkdir()
    assert prepare_output_dir(tmp_path, overwrite=True, run_config={"seed": 2}) is None
    assert set(os.listdir(tmp_path)) == {*mine, RUN_FILE}


def test_resume_finds_the_last_complete_checkpoint(tmp_path):
    prepare_output_dir(tmp_path, run_config=CONFIG)
    assert (
        prepare_output_dir(tmp_path, resume=True, run_config=CONFIG) is None
    )  # died before its first checkpoint
    make_checkpoint(tmp_path, 9)
    make_checkpoint(tmp_path, 10)
    cut_short = make_checkpoint(tmp_path, 11)
    (cut_short / "model.safetensors").write_bytes(b"w")
    (make_checkpoint(tmp_path, 12) / "sub/state.bin").unlink()
    (make_checkpoint(tmp_path, 15) / "sub/state.bin").write_bytes(b"state and more")
    (tmp_path / "checkpoint-13").mkdir()
    (tmp_path / ".incomplete-checkpoints/checkpoint-14").mkdir(parents=True)
    found = prepare_output_dir(tmp_path, resume=True, run_config={**CONFIG, "output_dir": "moved"})
    assert checkpoint_to_resume(True, tmp_path, None) == str(found)
    assert checkpoint_to_resume(None, tmp_path, None) is None
    assert found == tmp_path / "checkpoint-10"
    assert not (tmp_path / ".incomplete-checkpoints").exists()


def test_resume_with_another_configuration_lists_the_keys(tmp_path):
    prepare_output_dir(tmp_path, run_config=CONFIG)
    changed = {
        **CONFIG,
        "train": {"logging_steps": 6},
        "seed": 2,
        "mpoe": {"num_experts": 8, "shape": "paper"},
        "new": True,
    }
    with pytest.raises(ValueError) as error:
        prepare_output_dir(tmp_path, resume=True, run_config=changed)
    text = str(error.value)
    assert "seed: was 1, now 2" in text
    assert "mpoe.shape: was 'separable', now 'paper'" in text
    assert "new: was None, now True" in text
    assert "num_experts" not in text
    assert "logging_steps" not in text


def test_refusals(tmp_path):
    refuses(
        ValueError,
        "overwrite and resume exclude each other",
        prepare_output_dir,
        tmp_path,
        overwrite=True,
        resume=True,
    )
    (tmp_path / "file").touch()
    refuses(NotADirectoryError, "is a file", prepare_output_dir, tmp_path / "file")
    (tmp_path / RUN_FILE).write_text("{")
    refuses(
        ValueError,
        "does not describe a run",
        prepare_output_dir,
        tmp_path,
        resume=True,
        run_config=CONFIG,
    )


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (9, 10, 11, 100):
        make_checkpoint(tmp_path, step)
    for limit in (None, 0, -1):
        checkpoints.rotate(tmp_path, limit)
    assert len(checkpoints.list_checkpoints(tmp_path)) == 4
    checkpoints.rotate(tmp_path, 2, keep=tmp_path / "checkpoint-11")
    assert [checkpoints.step_of(path) for path in checkpoints.list_checkpoints(tmp_path)] == [
        11,
        100,
    ]
    checkpoints.rotate(tmp_path, 1)
    assert os.listdir(tmp_path) == ["checkpoint-100"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Its files, the manifest and the folder before the new name, which the run's folder then gets
    to keep."""
    told = []
    final = tmp_path / "checkpoint-5"
    monkeypatch.setattr(checkpoints, "sync", lambda path: told.append((path.name, final.exists())))
    make_checkpoint(tmp_path, 5)
    assert told[-1] == (tmp_path.name, True)
    before = [name for name, published in told if not published]
    assert len(before) == len(told) - 1
    assert checkpoints.MANIFEST in before
    assert before[-1] == final.name
    assert set(os.listdir(final)) <= set(before)
    monkeypatch.setattr("os.rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    refuses(OSError, "disk full", make_checkpoint, tmp_path, 6)
    assert checkpoints.list_checkpoints(tmp_path) == [final]


def test_metrics_survive_a_torn_line_and_drop_repeated_steps(tmp_path):
    for step in (1, 2, 3):
        write_metrics(
            tmp_path, {"step": step, "loss": torch.tensor(float(step)), "bad": float("nan")}
        )
    with (tmp_path / METRICS_FILE).open("a") as handle:
        handle.write('{"step": 4, "lo')
    write_metrics(tmp_path, {"event": "resume", "step": 2})
    write_metrics(tmp_path, {"step": 3, "loss": 30.0})
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 2, 3]
    assert records[-1]["loss"] == 30.0
    assert records[0]["bad"] is None
    assert len((tmp_path / METRICS_FILE).read_text().splitlines()) == 6


def test_expert_load():
    counts = torch.tensor([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0]])
    assert load_shares(counts) == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], None]
    summary = load_summary(counts)
    assert (summary["expert_min_share"], summary["expert_max_share"]) == (0.0, 1.0)
    assert summary["expert_entropy"] == pytest.approx((1 + 0) / 2)
    assert load_summary(torch.tensor([[5], [7]]))["expert_entropy"] == 1.0
    assert load_summary(torch.zeros(2, 4)) == {}


def test_a_folder_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_, **__: False)  # as root may write everywhere
    refuses(
        PermissionError,
        rf"output_dir must be a folder that can be read and written; {tmp_path} cannot be",
        check_folder,
        "output_dir",
        tmp_path / "run",
    )


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    def access(path, mode, **_):  # root may read everywhere
        return path != tmp_path or not mode & os.R_OK

    monkeypatch.setattr("os.access", access)
    refuses(PermissionError, f"{tmp_path} cannot be", prepare_output_dir, tmp_path)
    prepare_output_dir(tmp_path / "run")  # its parent need not be read


@pytest.mark.parametrize("target", ["nowhere", "link"])  # "link" leads to itself
def test_links_that_lead_to_no_folder(tmp_path, target):
    (tmp_path / "link").symlink_to(tmp_path / target)
    for folder in (tmp_path / "link", tmp_path / "link/run"):
        refuses(
            NotADirectoryError,
            r"output_dir must be a folder; .*link is a symbolic link that",
            prepare_output_dir,
            folder,
        )
    assert os.listdir(tmp_path) == ["link"]
    (tmp_path / "there").mkdir()
    (tmp_path / "good").symlink_to(tmp_path / "there")
    prepare_output_dir(tmp_path / "good")
    assert (tmp_path / "there" / RUN_FILE).exists()


def test_a_full_disk_is_named_with_its_folder(tmp_path):
    with (
        pytest.raises(
            OSError, match=rf"output_dir {tmp_path} could not be written: .*No space"
        ) as error,
        hold(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")  # as of a file that is open already
    assert error.value.errno == errno.ENOSPC
    with (
        pytest.raises(OSError, match=rf"output_dir {tmp_path} could not be written: .*os error 28"),
        hold(tmp_path),
    ):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )
    for other in (
        ConnectionError("no route"),
        OSError(errno.ENOSPC, "full", str(tmp_path / "file")),
    ):
        with pytest.raises(OSError) as same, hold(tmp_path):
            raise other
        assert same.value is other


def test_check_refuses_and_writes_nothing(tmp_path):
    folder = tmp_path / "run"
    check_output_dir(folder, run_config=CONFIG)
    refuses(ValueError, "nothing to resume", check_output_dir, folder, resume=True)
    assert not folder.exists()
    prepare_output_dir(folder, run_config=CONFIG)
    check_output_dir(folder, resume=True)  # the configuration is not known yet
    refuses(
        ValueError,
        "seed: was 1, now 2",
        check_output_dir,
        folder,
        resume=True,
        run_config={**CONFIG, "seed": 2},
    )
