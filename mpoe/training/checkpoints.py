"""Checkpoint folders that are either complete or absent, whenever the process dies; which one a run
resumes from.

A checkpoint is written under `.incomplete-checkpoints/`, every file is synced to disk, a manifest
with the size and the CRC-32 of every file is added, and only then is the folder renamed to
`checkpoint-N`. Deleting an old one renames it first. So a kill at any moment leaves complete
folders, plus leftovers under names that are never resumed from; a run resumes from the newest
checkpoint whose contents are intact.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

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
    """Make a fully written folder `staged` (named `checkpoint-N`) a checkpoint of `run_dir`,
    atomically.

    Returns the final path; an existing checkpoint of the same step is replaced.
    """
    paths = sorted(staged.rglob("*"))
    files = {str(path.relative_to(staged)): path for path in paths if path.is_file()}
    record = {
        "step": step_of(staged),
        "files": {name: path.stat().st_size for name, path in files.items()},
        "crc32": {name: _crc32(path) for name, path in files.items()},
        "choices": autotune.choices(),
    }
    (staged / MANIFEST).write_text(json.dumps(record))
    sync_tree(staged)
    final = Path(run_dir) / staged.name
    if final.exists():
        remove(final)
    os.rename(staged, final)
    sync(Path(run_dir))
    return final


def is_complete(checkpoint: str | Path) -> bool:
    """Whether every file that the manifest lists is there with its size."""
    sizes = _manifest(Path(checkpoint)).get("files")
    if sizes is None:
        return False
    paths = {Path(checkpoint) / name: size for name, size in sizes.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def damaged_files(checkpoint: str | Path) -> list[str]:
    """Names of files that are not, byte for byte, what was written (CRC-32); reads the whole
    checkpoint."""
    folder = Path(checkpoint)
    record = _manifest(folder)
    sums = record.get("crc32", {})
    # Only files whose size was checked: any other name could be of a device that never ends.
    return [name for name in record.get("files", {}) if _crc32(folder / name) != sums.get(name)]


def check_whole(checkpoint: str | Path) -> None:
    """Refuse a checkpoint that is not as it was written: ValueError that names the files."""
    if (Path(checkpoint) / MANIFEST).exists() and not is_complete(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is incomplete: files are missing or cut short")
    if damaged := damaged_files(checkpoint):
        raise ValueError(f"checkpoint {checkpoint} is damaged: {', '.join(damaged)} changed")


@contextlib.contextmanager
def reading(checkpoint: str | Path | None) -> Iterator[None]:
    """torch.load with weights_only refuses files that could run code, and raises many kinds of
    errors for invalid ones: ValueError instead."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {first_line(error)}") from error


def choices_of(checkpoint: str | Path) -> dict[str, str]:
    """How the run computed its products (`mpoe_kernels.contract.autotune.choices`); a resumed run
    goes on so.

    Empty for checkpoints that recorded none.
    """
    choices = _manifest(Path(checkpoint)).get("choices", {})
    return {problem: choice for problem, choice in choices.items() if isinstance(choice, str)}


def _manifest(checkpoint: Path) -> dict:
    try:
        record = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    is_record = isinstance(record, dict)
    fits = is_record and all(isinstance(record.get(key, {}), dict) for key in _MAPPINGS)
    return record if fits else {}


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
        raise ValueError(
            f"a checkpoint folder is named checkpoint-<step>; got {Path(checkpoint).name!r}"
        )
    return int(match.group(1))


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """All folders named ``checkpoint-N``, oldest step first; ``checkpoint-of-mine`` belongs to the
    user. Raises OSError for a folder that cannot be read."""
    run = Path(run_dir)
    paths = run.iterdir() if run.is_dir() else ()
    named = (path for path in paths if _FINAL.fullmatch(path.name) and path.is_dir())
    return sorted(named, key=step_of)


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """All complete checkpoints of a run, oldest step first."""
    return [path for path in checkpoint_folders(run_dir) if is_complete(path)]


def find_last_checkpoint(run_dir: str | Path) -> Path | None:
    """The complete and undamaged checkpoint with the highest step, or None; warns of newer ones
    that are damaged."""
    for checkpoint in reversed(list_checkpoints(run_dir)):
        damaged = damaged_files(checkpoint)
        if not damaged:
            return checkpoint
        warnings.warn(
            f"{checkpoint} is passed over: {', '.join(damaged)} changed since it was written",
            stacklevel=2,
        )
    return None


def rotate(run_dir: str | Path, limit: int | None, keep: str | Path | None = None) -> None:
    """Delete the oldest complete checkpoints until `limit` are left; never the newest, nor `keep`
    (the best one)."""
    if limit is None or limit <= 0:
        return
    checkpoints = list_checkpoints(run_dir)
    kept = Path(keep).name if keep else None
    surplus = [path for path in checkpoints[:-1] if path.name != kept]
    for path in surplus[: max(0, len(checkpoints) - limit)]:
        remove(path)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill half-way leaves no folder that looks like one."""
    doomed = checkpoint.with_name(_DELETING_PREFIX + checkpoint.name)
    delete(doomed)
    os.rename(checkpoint, doomed)
    delete(doomed)


def delete(folder: Path) -> None:
    """Delete a folder if it is there; of a symbolic link the link alone, never what it points
    to."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


def clean_leftovers(run_dir: str | Path) -> None:
    """Remove what a killed process left half-written or half-deleted."""
    for prefix in (_STAGING_PREFIX, _DELETING_PREFIX):
        for path in Path(run_dir).glob(f"{prefix}*"):
            if path.is_dir():
                delete(path)


def sync_tree(folder: Path) -> None:
    """Wait until all files in a folder, and then it itself, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer as _Base
else:
    _Base = object


def go_on_with_choices(checkpoint: str | None, arguments: Any) -> None:
    """Compute products as the run that is resumed did, and on all processes as the first one does.

    Timings choose among ways that round differently, so two machines or processes may choose
    differently.

    Args:
        checkpoint: the folder that the run is resumed from, if any.
        arguments: the run's `TrainingArguments`.
    """
    from accelerate.utils import broadcast_object_list

    choices = {} if checkpoint is None else choices_of(checkpoint)
    if arguments.world_size > 1:
        (choices,) = broadcast_object_list([{**autotune.choices(), **choices}])
    autotune.adopt(choices)


class CheckpointMixin(_Base):
    """A Hugging Face Trainer whose checkpoints are complete or absent (see
    `mpoe.training.checkpoints`).

    Raises:
        ValueError: on loading, a checkpoint that lacks weights, has too many, or cannot be read.
        OSError: on saving, a checkpoint that could not be written; the previous one is still there.
    """

    model: Any
    args: Any  # `MPOETrainingArguments`
    _staging: Path | None = None  # where a checkpoint is being assembled

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint stores a tied weight under one of its names; the Trainer would report the
        # others as missing. A weight that is missing under every name would continue from random
        # values.
        tensors = self.model.state_dict(keep_vars=True)
        missing = load_result.missing_keys
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in set(missing)}
        absent = [name for name in missing if id(tensors.get(name)) not in loaded]
        if self.args.save_only_trained:
            trained = self._trained()
            absent = [name for name in absent if name in trained]
        for problem, names in (("lacks", absent), ("has too many", load_result.unexpected_keys)):
            if names:
                raise ValueError(
                    f"the checkpoint {problem} weights of this model: "
                    f"{', '.join(sorted(names)[:5])}"
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.save_only_trained:
            whole = self.model.state_dict() if state_dict is None else state_dict
            trained = self._trained()
            state_dict = {name: value for name, value in whole.items() if name in trained}
        super()._save(output_dir, state_dict)

    def _trained(self) -> set[str]:
        return {name for name, value in self.model.named_parameters() if value.requires_grad}

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is being assembled, the Trainer writes into the staging folder.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # here, since only a run should wait for its import
        from transformers.trainer import TRAINER_STATE_NAME

        run_dir = Path(super()._get_output_dir(trial))
        staging = staging_root(run_dir)
        staged = staging / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and staging.exists():
            delete(staging)  # an earlier attempt failed half-way
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        # each library raises its own for a full disk
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(
                f"checkpoint {staged.name} could not be written to {run_dir}: {error}"
            ) from error
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.state.best_global_step:
            # The Trainer looked for the best checkpoint in the staging folder.
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best.name == staged.name or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            if self.state.best_global_step:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            publish(staged, run_dir)
            staging.rmdir()
            rotate(run_dir, self.args.save_total_limit, keep=self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
