"""The model of a folder is replaced as a whole: whenever the process dies, the folder has the old
one or the new one.

A new model is assembled in a folder inside, together with a manifest of its files, and synced to
disk. One rename says that it is whole. From then on its files are moved out, over the old model's;
what a kill interrupts there, the next call finishes. Only files that an earlier manifest names are
replaced or deleted, or, in a folder without one, those that would have been written.
"""

import contextlib
import errno
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mpoe.config.checks import is_file_name
from mpoe.models.base import REMOTE_FILE
from mpoe.models.card import CARD_FILE, may_write_card
from mpoe.models.composition import NONE
from mpoe.models.expert_mixture import BACKGROUND_FILE, EXPERTS_FOLDER
from mpoe.models.weight_files import BASE_FILE, INDEX, ONLY_FILE, WEIGHTS
from mpoe.training.checkpoints import delete, sync, sync_tree
from mpoe.training.run_lock import LOCK_FILE, hold

MANIFEST = "mpoe_files.json"
CONFIG = "config.json"
_STAGING = ".incomplete-model"
_WHOLE = ".complete-model"
_OLD = ".old.json"  # in the folder of a whole model: the names of files to delete
_LEFTOVERS = (LOCK_FILE, ".incomplete-", _WHOLE)
# Of the weights that `save_pretrained` writes; other safetensors are a user's.
WEIGHT_FILES = (WEIGHTS, "model-*-of-*.safetensors", INDEX, ONLY_FILE)
# What models and tokenizers save.
_SAVED = (
    CONFIG,
    "generation_config.json",
    "training_args.bin",
    *WEIGHT_FILES,
    BASE_FILE,
    REMOTE_FILE,
    CARD_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def written_files(folder: Path) -> set[str]:
    """Names of the files of ``folder`` that may be replaced; a card that a user edited is not among
    them."""
    names = _names_in(folder / MANIFEST, "files")
    if names:
        names.add(MANIFEST)
    else:
        names = {path.name for pattern in _SAVED for path in folder.glob(pattern)}
        composed = _names_in(folder / CONFIG, "mpoe_experts")
        names |= {f"{EXPERTS_FOLDER}/{name}.expert" for name in composed - {NONE}}
        # beside experts that are no mixture a background may be a user's
        if NONE in composed:
            names.add(BACKGROUND_FILE)
    return names if may_write_card(folder / CARD_FILE) else names - {CARD_FILE}


def published_by(folder: Path) -> str | None:
    """The identity of the run that published the model in ``folder``, if the manifest names one."""
    run = read_field(folder / MANIFEST, "run")
    return run if isinstance(run, str) else None


def read_field(file: Path, field: str) -> Any:
    """The value of ``field`` in a JSON file; ``None`` if there is none, or no such file."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))[field]
    return None


def _names_in(file: Path, field: str) -> set[str]:
    """The list ``field`` of a JSON file if it holds plain names, else nothing."""
    values = read_field(file, field)
    are_names = isinstance(values, list) and all(isinstance(name, str) for name in values)
    if not are_names or not all(is_file_name(part) for name in values for part in name.split("/")):
        return set()
    return set(values)


def foreign_files(folder: Path) -> list[str]:
    """Names of what is in ``folder`` and that no model that we wrote has there: files, links, and
    then folders."""
    names = {*written_files(folder), CARD_FILE}
    parents = _parents(names)
    files: list[str] = []
    folders: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_link = path.is_symlink()
        is_folder = path.is_dir() and not is_link
        is_ours = name in (parents if is_folder else names) or name.startswith(_LEFTOVERS)
        if not is_ours or (is_link and (path.is_dir() or name not in names)):
            (folders if is_folder else files).append(name)
    return files + folders


def _parents(names: Iterable[str]) -> set[str]:
    return {str(parent) for name in names for parent in Path(name).parents}


def check_free_names(folder: Path, names: Sequence[str]) -> None:
    """Refuse to write files ``names`` where something that we did not write has such a name, or
    that of their folder.

    Raises:
        FileExistsError: that says which.
    """
    wanted = {*names, *_parents(names)}
    for name in foreign_files(folder):
        if name in wanted:
            raise FileExistsError(
                errno.EEXIST, f"mpoe did not write {folder / name}: move it, or take another folder"
            )


def staging_folder(folder: Path) -> Path:
    """The folder inside ``folder`` in which a model is assembled; `publish` makes it the
    folder's."""
    return folder / _STAGING


def publish(folder: Path, keep: bool = False, run: str | None = None) -> None:
    """Put the fully written model in the staging folder in place of the one in ``folder``, which
    the caller holds.

    A user's own or edited model card is kept, as is every file that we did not write; to ``keep``
    is to keep our own files of other names as well. ``run`` is what `published_by` returns from
    now on.

    Raises:
        FileExistsError: such a file has the name of a new one; the old model is still there.
    """
    staging = staging_folder(folder)
    if not may_write_card(folder / CARD_FILE):
        (staging / CARD_FILE).unlink(missing_ok=True)
    names = sorted(
        path.relative_to(staging).as_posix() for path in staging.rglob("*") if not path.is_dir()
    )
    check_free_names(folder, names)
    old = written_files(folder) - {*names, MANIFEST}
    if keep:
        names = sorted(old.union(names))
        old = set()
    manifest: dict = {"files": names}
    if run is not None:
        manifest["run"] = run
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    (staging / _OLD).write_text(json.dumps({"files": sorted(old)}), encoding="utf-8")
    sync_tree(staging)
    os.rename(staging, folder / _WHOLE)
    sync(folder)
    _finish(folder)


def finish(folder: Path) -> None:
    """Finish a replacement that a killed process had begun, if there is one.

    Raises:
        FolderInUseError: another process is at it.
        OSError: the folder cannot be written.
    """
    if (folder / _WHOLE).is_dir():
        with hold(folder):
            _finish(folder)


def _finish(folder: Path) -> None:
    whole = folder / _WHOLE
    if whole.is_symlink() or not whole.is_dir():
        return
    files = [path for path in whole.rglob("*") if path.name != _OLD and not path.is_dir()]
    # The manifest says that the others may be replaced. Nothing can be loaded until the
    # configuration is there.
    files.sort(key=lambda path: (path == whole / CONFIG, path != whole / MANIFEST))
    old = _names_in(whole / _OLD, "files")
    remove(folder, old | {CONFIG} if whole / CONFIG in files else old)
    for path in files:
        name = path.relative_to(whole).as_posix()
        check_free_names(folder, [name])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)
    delete(whole)


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete files, configuration first, manifest last, and folders that become empty; nothing
    behind a link."""
    for name in sorted(names, key=lambda name: (name == MANIFEST, name != CONFIG)):
        file = folder / name
        parents = [folder / parent for parent in Path(name).parents[:-1]]
        if any(path.is_symlink() for path in parents) or (file.is_dir() and not file.is_symlink()):
            continue
        file.unlink(missing_ok=True)
        for path in parents:
            with contextlib.suppress(OSError):  # it is absent, or holds other files
                path.rmdir()
