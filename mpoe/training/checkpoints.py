"""Checkpoint folders that are either complete or absent, whenever the process dies.

A checkpoint is written under `.incomplete-checkpoints/`, every file is synced to disk, a manifest with the size and the
CRC-32 of every file is added, and only then is the folder renamed to `checkpoint-N`. Deleting an old one renames it
first. So a kill at any moment leaves complete folders, plus leftovers under names that are never resumed from; a run
resumes from the newest checkpoint whose contents are intact.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpoe.models.weight_files import first_line
from mpoe_kernels.contract import autotune

MANIFEST = "mpoe_checkpoint.json"
_MAPPINGS = ("files", "crc32", "choices")  # in the manifest
_FINAL = re.compile(r"checkpoint-(\d+)")
_STAGING_PREFIX = ".incomplete-"
_DELETING_PREFIX = ".deleting-"


def staging_root(run_dir: str | Path) -> Path:
    """The folder inside `run_dir` under which a checkpoint is assembled."""
    return Path(run_dir) / f"{_STAGING_PREFIX}checkpoints"


def publish(staged: Path, run_dir: str | Path) -> Path:
    """Make a fully written folder `staged` (named `checkpoint-N`) a checkpoint of `run_dir`, atomically.

    Returns the final path; an existing checkpoint of the same step is replaced.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    names = {str(path.relative_to(staged)): path for path in files}
    record = {
        "step": step_of(staged),
        "files": {name: path.stat().st_size for name, path in names.items()},
        "crc32": {name: _crc32(path) for name, path in names.items()},
        "choices": autotune.choices(),
    }
    for path in files:
        _sync(path)
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps(record))
    _sync(manifest)
    for folder in [path for path in staged.rglob("*") if path.is_dir()] + [staged]:
        _sync(folder)
    final = Path(run_dir) / staged.name
    if final.exists():
        remove(final)
    os.rename(staged, final)
    _sync(Path(run_dir))
    return final


def is_complete(checkpoint: str | Path) -> bool:
    """Whether every file that the manifest lists is there with its size."""
    checkpoint = Path(checkpoint)
    sizes = _manifest(checkpoint).get("files")
    return sizes is not None and all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


def damaged_files(checkpoint: str | Path) -> list[str]:
    """Names of files that are not, byte for byte, what was written (CRC-32); reads the whole checkpoint.

    Manifests written before checksums were kept list none, and such files are taken as they are.
    """
    checkpoint, record = Path(checkpoint), _manifest(Path(checkpoint))
    sums = record.get("crc32", {})
    # Only files whose size was checked: any other name could be of a device that never ends.
    return [name for name in record.get("files", {}) if name in sums and _crc32(checkpoint / name) != sums[name]]


def check_whole(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that is not as it was written: ValueError that names the files."""
    if (Path(checkpoint) / MANIFEST).exists() and not is_complete(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is incomplete: files are missing or cut short")
    if damaged := damaged_files(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is damaged: {', '.join(damaged)} changed")


@contextlib.contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """torch.load with weights_only refuses files that could run code, and raises many kinds of errors for invalid
    ones: ValueError instead."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from error


def choices_of(checkpoint: str | Path) -> dict[str, str]:
    """How the run computed its products (`mpoe_kernels.contract.autotune.choices`); a resumed run goes on so.

    Empty for checkpoints that recorded none.
    """
    found = _manifest(Path(checkpoint)).get("choices", {})
    return {problem: choice for problem, choice in found.items() if isinstance(choice, str)}


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        record = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    is_ours = isinstance(record, dict) and all(isinstance(record.get(key, {}), dict) for key in _MAPPINGS)
    return record if is_ours else {}


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def step_of(checkpoint: str | Path) -> int:
    """The optimizer step in a folder name `checkpoint-N`; raises ValueError on any other name."""
    match = _FINAL.fullmatch(Path(checkpoint).name)
    if match is None:
        raise ValueError(f"a checkpoint folder is named checkpoint-<step>; got {Path(checkpoint).name!r}")
    return int(match.group(1))


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """All complete checkpoints of a run, oldest step first."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        return []
    found = [path for path in run_dir.iterdir() if _FINAL.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def find_last_checkpoint(run_dir: str | Path) -> Path | None:
    """The complete and undamaged checkpoint with the highest step, or None; warns of newer ones that are damaged."""
    for checkpoint in reversed(list_checkpoints(run_dir)):
        damaged = damaged_files(checkpoint)
        if not damaged:
            return checkpoint
        warnings.warn(f"{checkpoint} is passed over: {', '.join(damaged)} changed since it was written", stacklevel=2)
    return None


def rotate(run_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left; never the newest, nor `keep` (the best one)."""
    if limit is None or limit <= 0:
        return
    checkpoints = list_checkpoints(run_dir)
    protected = {path for path in checkpoints if path == checkpoints[-1] or (keep and path.name == Path(keep).name)}
    surplus = len(checkpoints) - max(limit, len(protected))
    for path in [path for path in checkpoints if path not in protected][: max(surplus, 0)]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks like one."""
    doomed = checkpoint.with_name(_DELETING_PREFIX + checkpoint.name)
    delete(doomed)
    os.rename(checkpoint, doomed)
    delete(doomed)


def delete(folder: Path) -> None:
    """Delete a folder if it is there; of a symbolic link the link alone, never what it points to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def clean_leftovers(run_dir: str | Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    run_dir = Path(run_dir)
    if run_dir.is_dir():
        for path in run_dir.iterdir():
            if path.is_dir() and path.name.startswith((_STAGING_PREFIX, _DELETING_PREFIX)):
                delete(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
