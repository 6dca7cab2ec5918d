"""The end of a run: scores, measurements, the saved model, its record and report; an expert's file."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from mpoe.cli.compare import write_report
from mpoe.cli.files import REPORT_FILE, RESULTS_FILE, publish_model, staging_folder, write_json
from mpoe.cli.options import RunOptions
from mpoe.cli.runs import mixture_of, read_run
from mpoe.cli.scoring import evaluate_tasks, show_scores
from mpoe.data.task import Task
from mpoe.models.report import routed_layers, short_name
from mpoe_kernels.version import __version__

if TYPE_CHECKING:
    from mpoe.cli.train import Plan

ITEMS, AT_ONCE = 512, 8  # training items that the statistics of an expert's router come from, and of one batch


def finish(
    trainer: Any, tokenizer: Any, tasks: Sequence[Task], plan: Plan, start: str, seconds: float, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Save the model, evaluate it on the tasks' validation items and write the results, which are returned.

    Args:
        trainer: of the finished training, which took ``seconds``.
        tokenizer, plan: of the run.
        tasks: to evaluate on.
        start: the model that the run started from.
        sizes: of the data, for the record.
    """
    from mpoe.models.base import MPOEModelMixin
    from mpoe.models.others import write_card

    arguments, model, folder = plan.arguments, trainer.model, Path(str(plan.arguments.output_dir))
    trainer.save_model(str(staging_folder(folder)))  # every process takes part in it
    if arguments.should_save:
        tokenizer.save_pretrained(staging_folder(folder))
        publish_model(folder)
    if not trainer.is_world_process_zero():
        return {}
    found = evaluate_tasks(model, tokenizer, tasks, "validation", arguments.per_device_eval_batch_size * 4)
    steps = trainer.state.global_step
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    report = getattr(model, "parameter_report", None)
    versions = {"mpoe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    name = torch.cuda.get_device_name(arguments.device) if arguments.device.type == "cuda" else None
    threads = f"{arguments.device.type}, {torch.get_num_threads()} threads"
    batch = arguments.per_device_train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    results: dict[str, Any] = {
        "model": start,
        "class": type(model).__name__,
        "mixture": mixture_of(model),
        "layers": [short_name(name) for name, _ in routed_layers(model)],
        "data": sizes,
        "made_with": {**versions, "python": platform.python_version(), "device": name or threads},
        "steps": steps,
        "seconds": round(seconds, 2),
        "train_loss": losses[-1] if losses else None,
        "validation": found["scores"],
        "mean_validation": found["mean"],
        "baselines": found["baselines"],
        "remarks": found["remarks"],
        "parameters": report() if report else {"total": sum(p.numel() for p in model.parameters())},
        **measured(plan.run, seconds, steps, batch),
    }
    write_json(folder / RESULTS_FILE, results)
    if isinstance(model, MPOEModelMixin):
        write_card(model, folder, {f"validation, {task}": values for task, values in found["scores"].items()})
    write_report(folder / REPORT_FILE, [read_run(str(folder))])
    show_scores(found, f"validation after {steps} steps")
    print(f"model, metrics.jsonl, {RESULTS_FILE} and {REPORT_FILE} are in {folder}")
    return results


def _peak_of_process() -> dict[str, Any]:
    """Peak memory so far in bytes: of torch on the GPU, or of the whole process on the CPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return {"device": torch.cuda.get_device_name(), "peak_bytes": torch.cuda.max_memory_allocated()}
    try:
        import resource
    except ImportError:  # Windows
        return {"device": "cpu", "peak_bytes": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"device": "cpu", "peak_bytes": peak if sys.platform == "darwin" else peak * 1024}


def measured(options: RunOptions, seconds: float, steps: int, items_per_step: int) -> dict[str, Any]:
    """The requested measurements, JSON-able; also prints them."""
    report: dict[str, Any] = {}
    if options.compute_time:
        per_step = seconds / max(steps, 1)
        rate = items_per_step / per_step if per_step else None
        report["time"] = {"train_seconds": seconds, "seconds_per_step": per_step, "items_per_second": rate}
        print(f"training took {seconds:.1f} s: {per_step:.3f} s per step of {items_per_step} items")
    if options.compute_memory:
        report["memory"] = _peak_of_process()
        peak = report["memory"]["peak_bytes"]
        shown = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"most memory used ({report['memory']['device']}): {shown}")
    return report


def save_trained(trainer: Any, tokenizer: Any, items: Sequence[Any], plan: Plan) -> None:
    """Write the expert of a finished run, with statistics of the first training items."""
    from mpoe.models import collect_statistics, save_expert

    parts = (items[start : start + AT_ONCE] for start in range(0, min(len(items), ITEMS), AT_ONCE))
    statistics = collect_statistics(trainer.model, (trainer.data_collator(part) for part in parts))
    facts = {"steps": trainer.state.global_step, "learning_rate": plan.arguments.learning_rate}
    facts["tasks"] = plan.data.tasks
    file = Path(str(plan.arguments.output_dir)) / f"{plan.run.expert}.expert"
    save_expert(trainer.model, file, statistics=statistics, tokenizer=tokenizer, training=facts)
    print(f"the expert alone is {file} (mpoe compose)")
