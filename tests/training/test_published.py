"""A folder has the old model or the new one, whole, and whatever else is in it stays."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from mpoe.cli.errors import CommandError
from mpoe.cli.info import facts_of
from mpoe.cli.outputs import check_model_output, model_folder
from mpoe.cli.quiet import background_beside, made_background
from mpoe.training.output_dir import RUN_FILE, holds_earlier_model, prepare_output_dir, publish_run
from mpoe.training.published import (
    MANIFEST,
    check_free_names,
    finish,
    publish,
    staging_folder,
    written_files,
)
from mpoe.training.run_lock import FolderInUseError, hold
from tests.assertions import read_json, refuses

OLD = {
    "config.json": '{"mpoe_experts": ["law", "none"]}',
    "model.safetensors": "old",
    "tokenizer.json": "old",
}
OLD |= {"experts/law.expert": "law", "background.safetensors": "old"}
NEW = {"config.json": "{}", "model-00001-of-00001.safetensors": "new", "experts/med.expert": "med"}


class Saved:
    """Stands in for a model."""

    def __init__(self, files):
        self.files = files

    def save_pretrained(self, folder):
        for name, text in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def save(folder, files, overwrite=True):
    with model_folder(check_model_output("OUT", folder, overwrite), Saved(files), None):
        pass


def contents(folder):
    """Text by name, of links and empty folders what they are; without the manifest."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name] = "empty"
    found.pop(MANIFEST, None)
    return found


@pytest.fixture(params=["manifest", "older"])
def folder(request, tmp_path):
    """With the old model, as it is saved now, or as it was before there were manifests."""
    save(tmp_path / "k", OLD)
    if request.param == "older":
        (tmp_path / "k" / MANIFEST).unlink()
    return tmp_path / "k"


def test_a_model_replaces_another(folder):
    for name in ("README.md", ".incomplete-of-a-killed-save"):
        (folder / name).write_text("mine")
    (folder / ".incomplete-model").mkdir()
    refuses(CommandError, "holds a model; give --overwrite", save, folder, NEW, overwrite=False)
    save(folder, {**NEW, "README.md": "generated"})
    assert contents(folder) == {**NEW, "README.md": "mine", ".incomplete-of-a-killed-save": "mine"}
    assert read_json(folder / MANIFEST) == {"files": sorted(NEW)}
    save(folder, {"config.json": "{}"})
    assert contents(folder).keys() == {"config.json", "README.md", ".incomplete-of-a-killed-save"}


def linked(folder, name):
    """Moves a file or folder out and leaves a link."""
    shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def as_folder(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()


FOREIGN = {
    "notes.txt": lambda folder: (folder / "notes.txt").write_text("mine"),
    "run.json": lambda folder: (folder / "run.json").touch(),
    "mine.safetensors": lambda folder: (folder / "mine.safetensors").touch(),
    "experts/mine.expert": lambda folder: (folder / "experts/mine.expert").write_text("mine"),
    "experts/none.expert": lambda folder: (folder / "experts/none.expert").write_text("mine"),
    "experts": lambda folder: linked(folder, "experts"),
    "model.safetensors": lambda folder: as_folder(folder, "model.safetensors"),
    "README.md": lambda folder: (folder / "README.md").mkdir(),
    "dead": lambda folder: (folder / "dead").symlink_to("nowhere"),
    "logs": lambda folder: (folder / "logs").mkdir(),
    MANIFEST: lambda folder: (folder / MANIFEST).write_text(
        '{"files": ["../victim", "config.json"]}'
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_we_did_not_write_is_named_and_stays(folder, name):
    FOREIGN[name](folder)
    before = contents(folder)
    for overwrite in (False, True):
        refuses(
            CommandError,
            f"k holds {name}, which mpoe did not write",
            check_model_output,
            "OUT",
            folder,
            overwrite,
        )
        refuses(CommandError, f"holds {name}, which", save, folder, NEW, overwrite)
        assert contents(folder) == before, overwrite


def test_an_experts_file_without_a_model(tmp_path):
    save(tmp_path, OLD)
    for name in (MANIFEST, "config.json", "background.safetensors"):
        (tmp_path / name).unlink()
    refuses(
        CommandError, "holds experts/law.expert, which", check_model_output, "OUT", tmp_path, True
    )
    (tmp_path / "config.json").write_text('{"mpoe_experts": ["../../victim", "law"]}')
    assert "experts/law.expert" not in written_files(tmp_path)


def test_a_link_is_replaced_and_not_written_through(folder):
    linked(folder, "model.safetensors")
    save(folder, {**OLD, "model.safetensors": "new"})
    assert not (folder / "model.safetensors").is_symlink()
    assert (folder.parent / "elsewhere").read_text() == "old"


CALLS = "fsync mkdir rename replace rmdir unlink".split()  # of `os`


def left_by_kills(folder, patch):
    """Copies of a folder whose model is replaced, one before every change of files: what a process
    that dies there leaves."""
    copies = []
    is_copying = False

    def copied(call):
        def run(*values, **named):
            nonlocal is_copying
            if not is_copying:
                is_copying = True
                copies.append(shutil.copytree(folder, folder.parent / f"copy{len(copies)}"))
                is_copying = False
            return call(*values, **named)

        return run

    with patch.context() as counted:
        for name in CALLS:
            counted.setattr(os, name, copied(getattr(os, name)))
        save(folder, NEW)
    return copies


def test_killed_at_any_change_leaves_the_old_model_or_the_new_one(folder, monkeypatch):
    seen = []
    for there in left_by_kills(folder, monkeypatch):
        hidden = {name for name in contents(there) if name.startswith(".complete-model/")}
        is_begun = bool(hidden) and contents(there).keys() - hidden != OLD.keys() | {"_run.lock"}
        assert (
            not is_begun
            or not (there / "config.json").exists()
            or not hidden & {".complete-model/config.json"}
        ), there
        finish(there)
        left = {
            name: text
            for name, text in contents(there).items()
            if not name.startswith((".incomplete", "_run"))
        }
        assert left in (OLD, NEW), there
        assert not seen or left == NEW or seen[-1] == OLD, there  # never back
        seen.append(left)
        save(there, NEW)
        assert contents(there) == NEW, there
    assert OLD in seen
    assert NEW in seen
    assert len(seen) > 20


def test_one_of_two_wins(tmp_path):
    path = tmp_path / "k"
    for overwrite, message in (
        (False, "OUT .*k holds a model; give"),
        (True, "that another process wrote meanwhile"),
    ):
        one, other = (check_model_output("OUT", path, overwrite) for _ in range(2))
        with model_folder(one, Saved(OLD)):
            pass
        with pytest.raises(CommandError, match=message), model_folder(other, Saved(NEW)):
            pass
        assert contents(path) == OLD
    child = os.fork()
    if not child:
        with hold(path):
            (tmp_path / "held").touch()
            signal.pause()
    while not (tmp_path / "held").exists():
        pass
    refuses(FolderInUseError, f"in use by process {child}", check_model_output, "OUT", path, True)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("part", ["number", "time"])
def test_a_model_is_another_by_the_number_or_the_time_of_its_configuration(folder, part):
    seen, config = check_model_output("OUT", folder, True), folder / "config.json"
    if part == "number":
        shutil.copy2(config, folder.parent / "copy")
        os.replace(folder.parent / "copy", config)
    else:
        os.utime(config, ns=(0, 0))
    with (
        pytest.raises(CommandError, match="that another process wrote meanwhile"),
        model_folder(seen, Saved(NEW)),
    ):
        pass
    assert contents(folder) == {**OLD, "_run.lock": ""} or contents(folder) == OLD


def test_nothing_outside_is_touched_by_what_a_stranger_left(tmp_path):
    folder, victim = tmp_path / "k", tmp_path / "victim"
    victim.mkdir()
    (victim / "a.expert").write_text("mine")
    whole = folder / ".complete-model"
    for old in (
        ["../victim/a.expert"],
        [str(victim / "a.expert")],
        ["experts/a.expert"],
        [3],
        "x",
        None,
    ):
        shutil.rmtree(folder, ignore_errors=True)
        whole.mkdir(parents=True)
        (folder / "experts").symlink_to(victim)
        (whole / ".old.json").write_text(json.dumps({"files": old}))
        finish(folder)
        assert (victim / "a.expert").read_text() == "mine", old
    (whole / "experts").mkdir(parents=True)
    (whole / "experts/a.expert").write_text("theirs")
    refuses(FileExistsError, "mpoe did not write .*experts", finish, folder)
    (whole / MANIFEST).write_text('{"files": ["experts", "experts/a.expert", "config.json"]}')
    refuses(FileExistsError, "mpoe did not write .*experts", finish, folder)
    refuses(FileExistsError, "mpoe did not write .*experts", finish, folder)
    assert contents(victim) == {"a.expert": "mine"}
    shutil.rmtree(whole)
    whole.symlink_to(victim)
    refuses(
        CommandError,
        "holds .complete-model, which mpoe did not write",
        check_model_output,
        "OUT",
        folder,
        True,
    )
    finish(folder)
    (folder / "_run.lock").symlink_to(victim / "a.expert")
    with pytest.raises(OSError, match="Too many levels of symbolic links"), hold(folder):
        pass
    assert contents(victim) == {"a.expert": "mine"}


def test_info_finishes_what_a_kill_left(folder):
    (folder / ".complete-model").mkdir()
    (folder / "config.json").rename(folder / ".complete-model/config.json")
    refuses(ValueError, "must hold a valid field 'mpoe'", lambda: list(facts_of(folder)))
    assert contents(folder) == OLD


def test_a_background_that_is_a_link_out_is_not_taken(tmp_path, capsys):
    (tmp_path / "beside").mkdir()
    (tmp_path / "private").touch()
    (tmp_path / "beside/background.safetensors").symlink_to(tmp_path / "private")
    assert background_beside(None, [tmp_path / "beside"]) is None
    assert "background.safetensors must not be a link that leads out" in capsys.readouterr().out


@pytest.mark.parametrize("whose", ["mine", "another base's"])
def test_only_a_background_that_mpoe_wrote_is_replaced(tmp_path, monkeypatch, capsys, whose):
    file = tmp_path / "background.safetensors"
    save_file({"x": torch.ones(2)}, file, {} if whose == "mine" else {"base": "0"})
    before = file.read_bytes()
    assert written_files(tmp_path) == set()
    monkeypatch.setattr("mpoe.cli.quiet.collect_background", lambda *_: {"x": torch.zeros(2)})
    monkeypatch.setattr("mpoe.models.background.base_identity", lambda _: "1")
    assert not made_background(None, None, tmp_path)["x"].any()
    assert (file.read_bytes() == before) is (whose == "mine")
    assert ("not kept, as mpoe did not write" in capsys.readouterr().out) is (whose == "mine")


def test_a_run_keeps_other_files_and_refuses_those_in_its_way(tmp_path):
    for name in ("notes.txt", "law.expert"):
        (tmp_path / name).write_text("mine")
    refuses(
        FileExistsError,
        "mpoe did not write .*law.expert",
        check_free_names,
        tmp_path,
        ["law.expert"],
    )
    check_free_names(tmp_path, ["med.expert"])
    staging_folder(tmp_path).mkdir()
    Saved({"config.json": "{}", "law.expert": "law"}).save_pretrained(staging_folder(tmp_path))
    refuses(FileExistsError, "law.expert", publish, tmp_path)
    (tmp_path / "law.expert").unlink()
    for _ in range(2):
        staging_folder(tmp_path).mkdir(exist_ok=True)
        Saved({"config.json": "{}", "law.expert": "law"}).save_pretrained(staging_folder(tmp_path))
        publish(tmp_path)
        assert contents(tmp_path) == {"notes.txt": "mine", "config.json": "{}", "law.expert": "law"}
    staging_folder(tmp_path).mkdir()
    Saved({"med.expert": "med"}).save_pretrained(staging_folder(tmp_path))
    publish(tmp_path, keep=True)
    every = {"config.json": "{}", "law.expert": "law", "med.expert": "med"}
    assert contents(tmp_path) == {"notes.txt": "mine", **every}
    assert read_json(tmp_path / MANIFEST)["files"] == sorted(every)


def end_run(folder, files):
    staging_folder(folder).mkdir()
    Saved(files).save_pretrained(staging_folder(folder))
    publish_run(folder)


def test_a_run_replaces_an_earlier_model_when_it_ends(folder):
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    for seed in range(3):  # two that were killed
        prepare_output_dir(folder, True, run_config={"seed": seed}, keep_model=True)
        (folder / "results.json").touch()  # of a run that died later still
        assert holds_earlier_model(folder)
        after = contents(folder)
        assert json.loads(after.pop(RUN_FILE))["config"] == {"seed": seed}
        assert after == {**before, "results.json": ""}
    end_run(folder, NEW)
    assert not holds_earlier_model(folder)
    new = {**NEW, "results.json": "", "notes.txt": "mine"}
    after = contents(folder)
    del after[RUN_FILE]
    assert after == new
    assert prepare_output_dir(folder, resume=True, run_config={"seed": 2}) is None
    end_run(folder, {"law.expert": "law"})  # beside what the same run has published before
    after = contents(folder)
    del after[RUN_FILE]
    assert after == {**new, "law.expert": "law"}


def test_what_a_manifest_names_is_not_replaced_without_being_asked(tmp_path):
    prepare_output_dir(tmp_path, keep_model=True)
    assert not holds_earlier_model(tmp_path)
    end_run(tmp_path, {"law.expert": "law"})
    (tmp_path / RUN_FILE).unlink()
    refuses(ValueError, "holds a saved model", prepare_output_dir, tmp_path, keep_model=True)
    assert contents(tmp_path) == {"law.expert": "law"}
