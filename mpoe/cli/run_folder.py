"""A training run read from its folder: settings, logs and results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.arm import BASELINES
from mpoe.cli.errors import CommandError
from mpoe.cli.files import RESULTS_FILE

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


def read_run(path: str, name: str = "") -> RunFolder:
    """The run in folder ``path``.

    Raises:
        CommandError: not the folder of a run, or a file in it that cannot be read.
    """
    from mpoe.training.metrics_file import METRICS_FILE, read_metrics
    from mpoe.training.output_dir import RUN_FILE, flatten

    folder = Path(path)
    if not (folder / RUN_FILE).is_file():
        raise CommandError(f"{path} is not the folder of a run: it holds no {RUN_FILE}")
    try:
        settings = dict(flatten(json.loads((folder / RUN_FILE).read_text())["config"]))
        ended = (folder / RESULTS_FILE).is_file()
        results = dict(json.loads((folder / RESULTS_FILE).read_text())) if ended else {}
        records = read_metrics(folder) if (folder / METRICS_FILE).is_file() else []
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CommandError(f"{path} holds a run that cannot be read: {error}") from None
    return RunFolder(name or folder.name or path, settings, results, records)


def mixture_of(model: Any) -> str:
    """A short description of a model's feed-forward layers."""
    config = getattr(model, "mpoe_config", None)
    if config is None:
        return "dense"
    if config.moe_type == "none":
        return f"no router, modules {', '.join(config.targets)}"
    if config.expert_type == "dense":
        experts = "dense experts"
    else:
        experts = f"MPO experts, shape {config.shape if isinstance(config.shape, str) else 'own'}"
    return f"{config.num_experts} {experts}, top-{config.top_k}"


def made_with(device: Any) -> dict[str, str]:
    """Versions, and the device of a run."""
    import platform

    import torch
    import transformers

    from mpoe_kernels.version import __version__

    name = f"{device.type}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "mpoe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": name,
    }
