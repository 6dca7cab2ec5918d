"""Writes and reads a run's checkpoints atomically; chooses which one a run resumes from, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from mpoe.models.weight_files import check_weight_files
from mpoe.training import checkpoints
from mpoe.training.output_dir import differing_keys
from mpoe_kernels.contract import autotune

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainer as _Base
else:
    _Base = object


def checkpoint_to_resume(asked: str | Path | bool | None, run_dir: Path, model: Any) -> str | None:
    """The checked folder to resume from; None for a new start.

    Args:
        asked: True for the last complete checkpoint of ``run_dir``, or a folder.
        model: the model that is to continue.

    Raises:
        ValueError: there is none, or the given one is incomplete, damaged or of another model.
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
        checkpoints.check_whole(folder)
    check_weight_files(folder, model)
    if getattr(model, "config", None) is not None:
        _check_same_model(folder, model.config)
    return str(folder)


def _check_same_model(checkpoint: Path, config: Any) -> None:
    """Refuse a checkpoint whose ``config.json`` is of another ``model_type`` or has other experts than ``config``."""
    file = checkpoint / "config.json"
    if not file.is_file():
        return  # a module that is no Hugging Face model saves none
    both = (json.loads(file.read_text(encoding="utf-8")), json.loads(config.to_json_string(use_diff=False)))
    theirs, ours = ({"model_type": each.get("model_type"), "mpoe": each.get("mpoe") or {}} for each in both)
    differing = differing_keys(theirs, ours, frozenset({"rate_ratios", "backend"})).items()
    if differing:
        listed = "; ".join(f"{name} was {a!r}, the model has {b!r}" for name, (a, b) in differing)
        raise ValueError(f"resume_from_checkpoint must be of the same model: in {checkpoint} {listed}")


def go_on_with_choices(checkpoint: str | None, arguments: TrainingArguments) -> None:
    """Compute products as the run that is resumed did, and on all processes as the first one does.

    Timings choose among ways that round differently, so two machines or processes may choose differently.

    Args:
        checkpoint: the folder that the run is resumed from, if any.
        arguments: the run's arguments.
    """
    found = [{} if checkpoint is None else checkpoints.choices_of(checkpoint)]
    if arguments.world_size > 1:
        found = [{**autotune.choices(), **found[0]}]
        broadcast_object_list(found)
    autotune.adopt(found[0])


class CheckpointMixin(_Base):
    """A Hugging Face Trainer whose checkpoints are complete or absent (see `mpoe.training.checkpoints`).

    Raises:
        ValueError: on loading, a checkpoint that lacks weights, has too many, or cannot be read.
        OSError: on saving, a checkpoint that could not be written; the previous one is still there.
    """

    model: Any
    _staging: Path | None = None  # where a checkpoint is being assembled

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # A checkpoint stores a tied weight under one of its names; the Trainer would report the others as missing. A
        # weight that is missing under every name would continue from random values.
        tensors = self.model.state_dict(keep_vars=True)
        missing = load_result.missing_keys
        loaded = {id(tensor) for name, tensor in tensors.items() if name not in set(missing)}
        absent = [name for name in missing if id(tensors.get(name)) not in loaded]
        for problem, names in (("lacks", absent), ("has too many", load_result.unexpected_keys)):
            if names:
                raise ValueError(f"the checkpoint {problem} weights of this model: {', '.join(sorted(names)[:5])}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with checkpoints.reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _get_output_dir(self, trial: Any) -> str:
        # While a checkpoint is being assembled, the Trainer writes into the staging folder.
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        staging = checkpoints.staging_root(run_dir)
        staged = staging / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and staging.exists():
            checkpoints.delete(staging)  # an earlier attempt failed half-way
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:  # each library raises its own for a full disk
            raise OSError(f"checkpoint {staged.name} could not be written to {run_dir}: {error}") from error
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
            checkpoints.publish(staged, run_dir)
            staging.rmdir()
            checkpoints.rotate(run_dir, self.args.save_total_limit, keep=self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
