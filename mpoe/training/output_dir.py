"""Guards the output folder: one run per folder, and a run is resumed only with its own
configuration; and `metrics.jsonl`: one JSON object per log call, appended and flushed, readable
after any crash."""

import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpoe.config.checks import refusing
from mpoe.config.mixture import OBSOLETE
from mpoe.data.mappings import flatten, read_mapping
from mpoe.models.weight_files import check_weight_files, write_text
from mpoe.training.checkpoints import (
    check_whole,
    checkpoint_folders,
    clean_leftovers,
    delete,
    find_last_checkpoint,
)
from mpoe.training.published import (
    CONFIG,
    MANIFEST,
    WEIGHT_FILES,
    finish,
    publish,
    published_by,
    read_field,
    remove,
    written_files,
)
from mpoe.training.run_lock import check_free, hold

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"

# These do not change what a run computes, so a resumed run may change them.
NEUTRAL_KEYS = frozenset(
    {
        "output_dir",
        "overwrite",
        "resume",
        "overwrite_output_dir",
        "resume_from_checkpoint",
        "run_name",
        "report_to",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        "command",
        "learning_rate_from",
        "task_file",  # the contents of the last are kept instead
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "log_core_norms",
        "log_base_loss",
        "save_only_trained",
        "save_base",
        "log_expert_load",
        "log_on_each_node",
        "local_rank",
        "save_total_limit",
        "push_to_hub",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "skip_memory_metrics",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "save_only_model",
        "debug",
        "ddp_timeout",
        "allow_non_finite",
        "logging_nan_inf_filter",
        "description",
        *OBSOLETE,
    }
)
# Other files that a run writes at the top of its folder; `overwrite` deletes them and the
# checkpoints.
_RUN_FILES = (
    METRICS_FILE,
    "trainer_state.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "results.json",
    "report.html",
)


def prepare_output_dir(
    output_dir: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    run_config: Mapping[str, Any] | None = None,
    keep_model: bool = False,
) -> Path | None:
    """Make `output_dir` ready for a run, or refuse before any work is done.

    If several processes compete for a folder, one of them gets it. `MPOETrainer.train` locks it
    while it trains; callers that do more work there should lock it themselves
    (`with mpoe.training.run_lock.hold(output_dir):`).

    Args:
        output_dir: folder of the run; created if absent. Files in it that no run wrote are not
            touched.
        overwrite: delete an earlier run in this folder.
        resume: continue the run in this folder; its `run.json` must hold the same configuration.
        run_config: everything that determines what the run computes (JSON-able).
        keep_model: leave the model that ``overwrite`` would delete where it is, for `publish_run`
            to replace when the run has ended.

    Returns:
        The last complete checkpoint when resuming (None if the run died before its first), else
        None.

    Raises:
        ValueError: both switches are given; the folder holds a run or a model and neither is; there
            is nothing to resume; the configuration differs (the message lists the keys with both
            values).
        FolderInUseError: another process uses the folder; a `ValueError` that says which.
        NotADirectoryError: `output_dir` is a file, or a broken or circular symbolic link.
        PermissionError: `output_dir`, or its parent folder, cannot be written.
    """
    folder = Path(output_dir)
    config = _jsonable(run_config or {})
    check_output_dir(output_dir, overwrite, resume, config)
    with hold(folder):
        check_output_dir(folder, overwrite, resume, config)  # another may have claimed it meanwhile
        clean_leftovers(folder)
        if resume:
            return find_last_checkpoint(folder)
        # In its own order, which matters for label words.
        record: dict = {"config": config}
        if overwrite and _contents(folder) is not None:
            # The record of the earlier run goes last, by being replaced: no other run can be
            # resumed from its checkpoints.
            for path in checkpoint_folders(folder):
                delete(path)
            remove(folder, _RUN_FILES)
            if keep_model:
                record["run"] = uuid.uuid4().hex
            else:
                remove(folder, written_files(folder))
        write_text(folder / RUN_FILE, json.dumps(record, indent=1))
    return None


def holds_earlier_model(folder: Path) -> bool:
    """Whether the model in ``folder`` is one that its run is to replace, and has not yet (see
    `publish_run`)."""
    run = read_field(folder / RUN_FILE, "run")
    return run is not None and run != published_by(folder)


def publish_run(folder: Path) -> None:
    """Publish the model that a run, which holds ``folder``, has in its staging folder: in place of
    an earlier run's, but beside what this run has published before.

    Raises:
        FileExistsError: as `publish`.
    """
    publish(folder, not holds_earlier_model(folder), read_field(folder / RUN_FILE, "run"))


def check_output_dir(
    output_dir: str | Path,
    overwrite: bool = False,
    resume: bool = False,
    run_config: Mapping[str, Any] | None = None,
) -> None:
    """Refuse what `prepare_output_dir` would refuse, without writing anything.

    Args and Raises as there, but with `run_config=None` configurations are not compared, for use
    before it is known.
    """
    folder = Path(output_dir)
    if overwrite and resume:
        raise ValueError(
            "overwrite and resume exclude each other: delete the earlier run, or continue it"
        )
    check_folder("output_dir", output_dir)
    check_free(folder)
    finish(folder)
    if not resume:
        if not overwrite and (contents := _contents(folder)) is not None:
            raise ValueError(f"output_dir {folder} holds {contents} or choose another folder")
        return
    saved = read_record(folder)
    if saved is None:
        raise ValueError(f"nothing to resume: {folder} holds no {RUN_FILE} of an earlier run")
    differences = differing_keys(saved, run_config) if run_config is not None else {}
    if differences:
        listed = "; ".join(
            f"{key}: was {old!r}, now {new!r}" for key, (old, new) in differences.items()
        )
        raise ValueError(f"cannot resume {folder} with a different configuration ({listed})")


def check_folder(name: str, folder: str | Path) -> Path:
    """``folder`` as a path, if it can be read and written, or created.

    Raises: NotADirectoryError: a file is in its way, or a broken or circular symbolic link.
        PermissionError: this process may not read, write or create it.
    """
    if re.search("^$|[\0\ud800-\udfff]", str(folder)):
        raise NotADirectoryError(
            f"{name} must be a folder; got {str(folder)!r}, which is no name in UTF-8"
        )
    path = Path(folder)
    upward = (path, *path.absolute().parents)
    lost = next((p for p in upward if p.is_symlink() and not p.exists()), None)
    if lost is not None:
        raise NotADirectoryError(
            f"{name} must be a folder; {lost} is a symbolic link that leads to none"
        )
    there = next(p for p in upward if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name} must be a folder; {there} is a file")
    effective = os.access in os.supports_effective_ids
    # what cannot be read looks empty
    needed = os.W_OK | os.X_OK | (os.R_OK if there == path else 0)
    if not os.access(there, needed, effective_ids=effective):
        raise PermissionError(
            f"{name} must be a folder that can be read and written; {there} cannot be"
        )
    if there != path:
        try:
            tempfile.TemporaryDirectory(dir=there).cleanup()
        except OSError as error:  # a system folder
            raise PermissionError(
                f"{name} must be a folder that can be created; {there} holds none: {error}"
            ) from None
    return path


def _contents(folder: Path) -> str | None:
    """What is in ``folder`` that a run must not mix with; None if there is nothing of the kind."""
    of_run = ((folder / name).exists() for name in (RUN_FILE, METRICS_FILE))
    if any(of_run) or checkpoint_folders(folder):
        return "another run; continue it with --resume, delete it with --overwrite,"
    # What `save_pretrained` and other commands write; a run in the same folder would be mixed with
    # it.
    if any(any(folder.glob(name)) for name in (CONFIG, MANIFEST, "results.json", *WEIGHT_FILES)):
        return "a saved model or results; delete them with --overwrite,"
    return None


def differing_keys(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    neutral_keys: frozenset[str] = NEUTRAL_KEYS,
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (saved value, current value) of all relevant differences; absent values are
    None."""
    old = dict(flatten(_jsonable(saved)))
    new = dict(flatten(_jsonable(current)))
    keys = [key for key in dict.fromkeys([*old, *new]) if not is_neutral(key, neutral_keys)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def read_record(folder: str | Path) -> dict[str, Any] | None:
    """What the run in ``folder`` was started with; None if it holds no run.

    Raises:
        ValueError: ``run.json`` cannot be read.
    """
    file = Path(folder) / RUN_FILE
    unfit = (OSError, ValueError, LookupError, TypeError)
    with refusing(f"{file} does not describe a run: ", unfit):
        return dict(json.loads(file.read_text())["config"]) if file.is_file() else None


def checkpoint_to_resume(
    requested: str | Path | bool | None, run_dir: Path, model: Any
) -> str | None:
    """The checked folder to resume from; None for a new start.

    Args:
        requested: True for the last complete checkpoint of ``run_dir``, or a folder.
        model: the model that is to continue.

    Raises:
        ValueError: there is none, or it holds weights alone; the given one is incomplete, damaged
            or of another model.
    """
    if not requested:
        return None
    folder = find_last_checkpoint(run_dir) if requested is True else Path(str(requested))
    if folder is None:
        raise ValueError(f"nothing to resume: no complete checkpoint in {run_dir}")
    if requested is not True:
        check_whole(folder)
    # the latter is DeepSpeed's
    if not any(any(folder.glob(name)) for name in ("*optimizer*", "global_step*")):
        raise ValueError(
            f"checkpoint {folder} holds no optimizer's state (--save_only_model): a run cannot go "
            "on"
        )
    check_weight_files(folder, model)
    if getattr(model, "config", None) is not None:
        _check_same_model(folder, model.config)
    return str(folder)


def _check_same_model(checkpoint: Path, config: Any) -> None:
    """Refuse a checkpoint whose ``config.json`` is of another ``model_type`` or has other experts
    than ``config``."""
    file = checkpoint / "config.json"
    if not file.is_file():
        return  # a module that is no Hugging Face model saves none
    theirs, ours = (
        {"model_type": values.get("model_type"), "mpoe": values.get("mpoe") or {}}
        for values in (read_mapping(file, "configuration"), config.to_dict())
    )
    differing = differing_keys(theirs, ours, OBSOLETE | {"rate_ratios", "backend"}).items()
    if differing:
        listed = "; ".join(f"{name} was {a!r}, the model has {b!r}" for name, (a, b) in differing)
        raise ValueError(
            f"resume_from_checkpoint must be of the same model: in {checkpoint} {listed}"
        )


def _jsonable(config: Mapping) -> dict:
    # Through JSON and back, so that values compare equal to those from a file on resume (tuples
    # become lists).
    return json.loads(json.dumps(dict(config), default=str))


def is_neutral(dotted: str, neutral_keys: frozenset[str] = NEUTRAL_KEYS) -> bool:
    """Whether a dotted name contains one of ``neutral_keys``: such a setting does not change what a
    run computes."""
    return any(part in neutral_keys for part in dotted.split("."))


# ------------------------------------------------------------- metrics.jsonl


def write_metrics(folder: str | Path, record: Mapping[str, Any]) -> None:
    """Append a record, stamped with the time (seconds since the epoch), to
    ``folder/metrics.jsonl``; numbers that JSON cannot hold (NaN, infinity) are written as null,
    arrays and tensors as lists."""
    path = Path(folder) / METRICS_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    stamped = json.dumps(
        {**record, "time": round(time.time(), 3)},
        default=lambda v: getattr(v, "tolist", v.__str__)(),
    )
    line = json.dumps(json.loads(stamped, parse_constant=lambda _: None))
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read() != b"\n":
                file.write(b"\n")  # a killed process left half a line: start a new line
        file.write(line.encode() + b"\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a metrics file (or of the folder that holds one), in order.

    Half-written lines are skipped. If a resumed run repeated records (those after the step at which
    it resumed), only the later ones are kept.
    """
    file = Path(path) / METRICS_FILE if Path(path).is_dir() else Path(path)
    records: list[dict] = []
    for line in file.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record.get("event") == "resume":
            records = [earlier for earlier in records if earlier.get("step", 0) <= record["step"]]
        records.append(record)
    return records
