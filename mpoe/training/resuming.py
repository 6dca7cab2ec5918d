"""Which checkpoint a run goes on from, and what is refused as one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpoe.models.weight_files import check_weight_files, first_line
from mpoe.training import checkpoints


def checkpoint_to_resume(asked: str | Path | bool | None, run_dir: Path, model: Any) -> str | None:
    """The folder to resume from, checked; None for a fresh start.

    Args:
        asked: True for the last complete checkpoint of ``run_dir``, or a folder.
        model: the model that is to continue.

    Raises:
        ValueError: there is none, or the given one is incomplete, damaged, or of another model.
    """
    if not asked:
        return None
    if asked is True:
        found = checkpoints.find_last_checkpoint(run_dir)
        if found is None:
            raise ValueError(f"nothing to resume: no complete checkpoint in {run_dir}")
        folder = found
    else:
        folder = Path(str(asked))
        if (folder / checkpoints.MANIFEST).exists() and not checkpoints.is_complete(folder):
            raise ValueError(f"checkpoint {folder} is incomplete: files are missing or cut short")
        damaged = checkpoints.damaged_files(folder)
        if damaged:
            raise ValueError(f"checkpoint {folder} is damaged: {', '.join(damaged)} changed")
    check_weight_files(folder, model)
    if getattr(model, "config", None) is not None:
        checkpoints.check_same_model(folder, model.config)
    return str(folder)


@contextlib.contextmanager
def reading(checkpoint: str | None) -> Iterator[None]:
    """torch.load with weights_only refuses what could run code, and has many errors for what is no checkpoint."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from error
