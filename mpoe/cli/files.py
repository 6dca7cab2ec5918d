"""What commands write: atomic files, whole models, and folders that are checked before any work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"
MODEL = ("config.json", "*.safetensors")  # files of a saved model
MODEL_OR_RUN = ("config.json", "run.json")
_STAGING = ".incomplete-model"


def write_json(path: Path, values: Any) -> None:
    """Write JSON with `mpoe.models.weight_files.write_text`."""
    from mpoe.models.weight_files import write_text

    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def staging_folder(folder: Path) -> Path:
    """The folder inside ``folder`` in which a model is assembled; `publish_model` moves its files out."""
    return folder / _STAGING


def publish_model(folder: Path) -> None:
    """Move a fully written model from the staging folder into ``folder``, replacing one that was there.

    The old ``config.json`` is removed first and the new one is moved last, so a kill in between leaves nothing that can
    be loaded. A user's own model card is kept.
    """
    from mpoe.models.others import CARD_FILE, may_write_card

    staging = staging_folder(folder)
    files = sorted(path for path in staging.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (folder / "config.json").unlink(missing_ok=True)
    new = {path.relative_to(staging) for path in files}
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        if old.relative_to(folder) not in new:
            old.unlink()  # shards of an earlier model
    for path in sorted(files, key=lambda path: path == staging / "config.json"):
        target = folder / path.relative_to(staging)
        if path.name == CARD_FILE and not may_write_card(target):
            continue  # the user's own
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(staging)


def check_output(
    name: str,
    folder: Path,
    overwrite: bool,
    what: str = "a model",
    own: Iterable[str] = MODEL,
    others: Iterable[str] = (),
) -> Path:
    """Return ``folder``, the value of the argument ``name``; nothing is written yet.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written or created.
        CommandError: it holds files of the patterns ``others`` (of models and runs), or without ``overwrite`` of the
            patterns ``own``, which are ``what``.
    """
    from mpoe.training.output_dir import check_folder

    def holds(patterns: Iterable[str]) -> bool:
        return any(any(folder.glob(pattern)) for pattern in patterns)

    check_folder(name, folder)
    if holds(others):
        raise CommandError(f"{name} {folder} holds a model or a run; choose another folder")
    if holds(own) and not overwrite:
        raise CommandError(f"{name} {folder} holds {what}; give --overwrite to replace it, or another folder")
    return folder


@contextlib.contextmanager
def model_folder(folder: Path, *parts: Any) -> Iterator[Path]:
    """A staging folder into which the ``parts`` (model, tokenizer; None is left out) are saved; its files are in
    ``folder`` when the block ends without an error."""
    from mpoe.training.run_lock import hold

    with hold(folder):
        staging = staging_folder(folder)
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed process
        staging.mkdir(parents=True)
        try:
            for part in parts:
                if part is not None:
                    part.save_pretrained(staging)
            yield staging
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        publish_model(folder)


def check_writable_file(name: str, file: Path) -> Path:
    """Return ``file``; ValueError if its folder is missing or a folder has its name."""
    if file.is_dir():
        raise ValueError(f"{name} must be a file; {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"{name} must be in an existing folder; there is no folder {file.parent}")
    return file
