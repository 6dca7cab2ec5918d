"""Where commands write: files and folders that are checked before any work, and models as a
whole."""

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mpoe.cli.errors import CommandError
from mpoe.models.weight_files import write_text
from mpoe.training.checkpoints import clean_leftovers, delete
from mpoe.training.output_dir import check_folder
from mpoe.training.published import (
    CONFIG,
    finish,
    foreign_files,
    publish,
    staging_folder,
    written_files,
)
from mpoe.training.run_lock import check_free, hold

RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"


def write_json(path: Path, values: Any) -> None:
    """Write JSON with `mpoe.models.weight_files.write_text`."""
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def check_output(
    name: str,
    folder: str | Path,
    overwrite: bool,
    what: str,
    patterns: Iterable[str],
) -> Path:
    """Return ``folder``, the value of the argument ``name``; nothing is written yet.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written or created.
        CommandError: it holds a model or a run, or without ``overwrite`` files of the
            ``patterns``, which are ``what``.
    """

    def holds(globs: Iterable[str]) -> bool:
        return any(any(path.glob(pattern)) for pattern in globs)

    path = check_folder(name, folder)
    if holds(("config.json", "run.json")):
        raise CommandError(f"{name} {path} holds a model or a run; choose another folder")
    if holds(patterns) and not overwrite:
        raise CommandError(
            f"{name} {path} holds {what}; give --overwrite to replace it, or another folder"
        )
    return path


class Output(NamedTuple):
    """A folder that `check_model_output` has seen: what was given, and its configuration's file
    then: its number, which a later file may get again, and its time."""

    name: str
    folder: Path
    overwrite: bool
    config: tuple[int, int] | None


def check_model_output(name: str, folder: str | Path, overwrite: bool) -> Output:
    """What `model_folder` takes, for the ``folder`` that is the value of the argument ``name``.

    Raises:
        NotADirectoryError, PermissionError: it cannot be written or created.
        FolderInUseError: another process writes it.
        CommandError: it holds a file that no command wrote, or without ``overwrite`` a model.
    """
    path = check_folder(name, folder)
    check_free(path)
    finish(path)
    foreign = foreign_files(path)
    if foreign:
        raise CommandError(
            f"{name} {path} holds {foreign[0]}, which mpoe did not write; choose another folder"
        )
    if written_files(path) and not overwrite:
        raise CommandError(
            f"{name} {path} holds a model; give --overwrite to replace it, or another folder"
        )
    config = path / CONFIG
    state = config.stat() if config.is_file() else None
    return Output(name, path, overwrite, state and (state.st_ino, state.st_mtime_ns))


@contextlib.contextmanager
def model_folder(output: Output, *parts: Any) -> Iterator[Path]:
    """A staging folder into which the ``parts`` (model, tokenizer; None is left out) are saved; its
    files are in the folder of ``output``, in place of those of an earlier model, when the block
    ends without an error.

    Raises:
        CommandError: as `check_model_output`; another process has written the folder since.
    """
    folder = output.folder
    with hold(folder):
        if check_model_output(*output[:3]) != output:
            raise CommandError(
                f"{output.name} {folder} holds a model that another process wrote meanwhile"
            )
        clean_leftovers(folder)
        staging = staging_folder(folder)
        staging.mkdir()
        try:
            for part in parts:
                if part is not None:
                    part.save_pretrained(staging)
            yield staging
            publish(folder)
        except BaseException:
            delete(staging)
            raise


def check_writable_file(name: str, file: Path) -> Path:
    """Return ``file``; ValueError if its folder is missing or a folder has its name."""
    if file.is_dir():
        raise ValueError(f"{name} must be a file; {file} is a folder")
    if not file.parent.is_dir():
        raise ValueError(f"{name} must be in an existing folder; there is no folder {file.parent}")
    return file
