"""The output folder of a run: whose it is, what it was started with, and its last complete checkpoint."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError

RUN_FILE = "run.json"
RESULTS_FILE = "results.json"
METRICS_FILE = "metrics.jsonl"
_OWN_FILES = (RUN_FILE, RESULTS_FILE, METRICS_FILE, "report.html", "config.json", "model.safetensors")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# what may differ between the start of a run and its resumption, because it does not decide the weights
_FREE = {
    "output_dir",
    "overwrite",
    "resume",
    "resume_from_checkpoint",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "log_level",
    "disable_tqdm",
    "report_to",
    "run_name",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
}


def write_json(path: Path, values: Any) -> None:
    """Write JSON so that a reader (or a kill) never sees half of it."""
    scratch = path.with_name(path.name + ".part")
    scratch.write_text(json.dumps(values, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for entry in folder.iterdir():
        match = _CHECKPOINT.fullmatch(entry.name)
        if match and entry.is_dir():
            found.append((int(match.group(1)), entry))
    return sorted(found)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state file last."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and "global_step" in state


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; a torn one (killed while saving) is passed over."""
    complete = [path for _, path in _checkpoints(folder) if is_complete(path)]
    return complete[-1] if complete else None


def holds_run(folder: Path) -> bool:
    """Whether ``folder`` already holds the files of a run."""
    return folder.is_dir() and (any((folder / n).exists() for n in _OWN_FILES) or bool(_checkpoints(folder)))


def clear_run(folder: Path) -> None:
    """Remove the files of an earlier run, and nothing else."""
    for _, checkpoint in _checkpoints(folder):
        shutil.rmtree(checkpoint)
    for name in _OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def check_output_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse a folder that cannot take this run; changes nothing.

    Raises:
        CommandError: both options given, a file in the way, another run without either option.
    """
    if overwrite and resume:
        raise CommandError("--overwrite and --resume exclude each other; give one of them")
    if folder.exists() and not folder.is_dir():
        raise CommandError(f"output_dir must be a folder; {folder} is a file")
    if holds_run(folder) and not (overwrite or resume):
        raise CommandError(
            f"output_dir {folder} holds another run; give --resume to continue it, --overwrite to replace it, or "
            "another folder"
        )


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(values), default=str))


def check_same_run(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run that was started with other settings.

    Raises:
        CommandError: naming every setting that differs, with both values.
    """
    file = folder / RUN_FILE
    if not file.is_file():
        raise CommandError(f"--resume: {folder} holds no {RUN_FILE}, so it is not a run of mpoe train")
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"--resume: {file} is not readable as a run's settings") from None
    now = _plain(settings)
    different = [
        f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
        for name in sorted(set(before) | set(now))
        if name not in _FREE and before.get(name) != now.get(name)
    ]
    if different:
        raise CommandError(f"--resume: the run in {folder} was started with a different config: {'; '.join(different)}")


def start_run(folder: Path, settings: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder ready and record the settings of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        clear_run(folder)
    write_json(folder / RUN_FILE, {"settings": _plain(settings)})
