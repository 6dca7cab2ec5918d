"""Training runs read from their folders: settings, logs and results, and the data for other commands."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mpoe.cli.command import CommandError
from mpoe.cli.models import RESULTS_FILE
from mpoe.cli.options import BASELINES
from mpoe.cli.tasks import DataOptions
from mpoe.data.spec import TaskSpec
from mpoe.training import find_last_checkpoint
from mpoe.training.output_dir import METRICS_FILE, RUN_FILE, flatten, read_metrics

# Kinds of `model.parameter_report()` in the order of reports, and their descriptions.
PARAMETERS = {
    "central": "central cores, shared by the experts of a layer",
    "auxiliary": "auxiliary cores of all experts",
    "expert": "weights of dense experts",
    "router": "routers",
    "rest": "everything else: embeddings, attention, norms, biases, layers that stayed dense",
    "total": "the whole model",
    "trainable": "of the whole model, what trains",
    "dense_total": "for comparison: the model before conversion",
    "switch_total": "for comparison: as many experts with full weights (Switch)",
}
SOURCES = {"data_dir", "tasks", "task_file", "eval_tasks"}  # options that select the items


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        name: its name in comparisons.
        settings: from ``run.json``, by dotted name.
        results: from ``results.json``; empty until the run has finished.
        records: from ``metrics.jsonl``.
    """

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def mixture(self) -> str:
        """A short description of the feed-forward layers; empty if neither results nor settings have it."""
        if self.settings.get("arm.baseline") in BASELINES:
            return BASELINES[self.settings["arm.baseline"]]
        if "mixture" in self.results:
            return str(self.results["mixture"])
        count, shape = self.settings.get("experts.num_experts"), self.settings.get("experts.shape")
        return f"{count} experts, {shape}" if count is not None else ""


def read_record(folder: Path) -> dict[str, Any] | None:
    """What the run in ``folder`` was started with; None if it holds no run.

    Raises:
        CommandError: ``run.json`` cannot be read.
    """
    file = folder / RUN_FILE
    try:
        return dict(json.loads(file.read_text())["config"]) if file.is_file() else None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CommandError(f"{file} does not describe a run: {error}") from None


def model_of_experiment(folder: str) -> str:
    """The final model of a run, or its last complete checkpoint if the run has not finished.

    Raises: CommandError: no such folder, or it has neither.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CommandError(f"load_experiment must be the folder of an earlier run; got {folder!r}")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return str(path)
    checkpoint = find_last_checkpoint(path)
    if checkpoint is None:
        raise CommandError(f"load_experiment: {folder} holds neither a model nor a complete checkpoint")
    return str(checkpoint)


def read_run(path: str, name: str = "") -> RunFolder:
    """The run in folder ``path``.

    Raises:
        CommandError: not the folder of a run, or a file in it that cannot be read.
    """
    folder = Path(path)
    record = read_record(folder)
    if record is None:
        raise CommandError(f"{path} is not the folder of a run: it holds no {RUN_FILE}")
    try:
        ended = (folder / RESULTS_FILE).is_file()
        results = dict(json.loads((folder / RESULTS_FILE).read_text())) if ended else {}
        records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} holds a run that cannot be read: {error}") from None
    return RunFolder(name or folder.name or path, dict(flatten(record)), results, records)


def mixture_of(model: Any) -> str:
    """A short description of a model's feed-forward layers."""
    config = getattr(model, "mpoe_config", None)
    if config is None:
        return "dense"
    if config.moe_type == "none":
        return f"no router, modules {', '.join(config.targets)}"
    shape = config.shape if isinstance(config.shape, str) else "own"
    experts = "dense experts" if config.expert_type == "dense" else f"MPO experts, shape {shape}"
    return f"{config.num_experts} {experts}, top-{config.top_k}"


# -------------------------------------------------------------- for commands that look at a run's model


def data_of_run(
    model_dir: str, data: DataOptions, flags: set[str]
) -> tuple[DataOptions, int, dict[str, TaskSpec] | None]:
    """Data options as in the run whose model or checkpoint is in ``model_dir``, unless a flag says otherwise: lengths,
    columns, label words, and the items if no flag selects any.

    Returns:
        The options, the seed that split and drew the run's items (0 without a run; with another one,
        split_validation_test would test on items that the run validated on), and the tasks that its ``task_file``
        described at that time (None: none, or another file is given).

    Raises:
        CommandError: ``run.json`` cannot be read.
    """
    run = read_record(Path(model_dir)) or read_record(Path(model_dir).resolve().parent) or {}
    kept = run.get("data", {})
    names = {f.name for f in fields(DataOptions) if f.name not in flags} & set(kept)
    if flags & SOURCES:
        names -= SOURCES
    taken = {name: kept[name] for name in sorted(names) if kept[name] != getattr(data, name)}
    if taken:
        print("as in training: " + ", ".join(f"{name} {value}" for name, value in taken.items()))
    training = run.get("training", {})
    seed = training.get("seed", 0) if training.get("data_seed") is None else training["data_seed"]
    data = replace(data, **taken) if taken else data
    return data, int(seed), None if "task_file" in flags else _descriptions(run)


def _descriptions(run: dict[str, Any]) -> dict[str, TaskSpec] | None:
    """The tasks of the run's ``task_file`` at that time; None if the run saved none."""
    kept = run.get("described")
    try:
        return {name: TaskSpec.from_mapping(name, values) for name, values in kept.items()} if kept else None
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"described in run.json does not describe tasks: {error}") from None
