"""What `mpoe train --expert` does besides: its settings, as much validation as training can afford,
losses beside the base's, and the expert's file."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Subset

from mpoe.cli.errors import CommandError
from mpoe.cli.models import Source, load_model
from mpoe.cli.quiet import (
    changes_of_expert,
    facts_of_changes,
    made_background,
    speaks,
    table_of_changes,
)
from mpoe.cli.report import Table
from mpoe.config.checks import is_file_name
from mpoe.data.encode import as_batches
from mpoe.data.metrics import average_score
from mpoe.models import collect_statistics, save_expert
from mpoe.models.composition import NONE
from mpoe.models.expert_files import Expert, write_expert
from mpoe.models.table import ENCODER
from mpoe.training import MPOETrainingArguments
from mpoe.training.published import staging_folder

if TYPE_CHECKING:
    from mpoe.cli.train import Plan

# Of an expert's run. Beside a frozen model a step costs about two forward passes of its items, so
# so many items of validation and statistics per trained one take less than 15% of training's
# time, also with the fewest after 40 steps of four items.
MEASURED = 0.25
MOST_STATISTICS, LEAST_STATISTICS = 512, 24  # items
LEAST_VALIDATION, ENOUGH = 10, 64  # items; with as many as the latter, at `OFTEN` points of a run
OFTEN = 3
AT_ONCE = 8  # training items of a batch that the statistics of an expert's router come from


def settle_expert(plan: Plan, source: Source) -> None:
    """Set what a run with --expert needs: one expert of neurons, everything else frozen."""
    name = plan.run.expert
    if not is_file_name(name) or name == NONE:
        raise CommandError(
            f"expert must be a name, which the file has too, other than {NONE!r}; got {name!r}"
        )
    mixtures = set(plan.mixture_options) - {"neurons", "backend"}
    if mixtures:
        raise CommandError(
            f"expert trains one expert beside the model; {min(mixtures)} is for mixtures"
        )
    if source.is_mpoe or source.style == ENCODER:
        raise CommandError(
            f"expert needs a dense language model that stays as it is; {source.path} is or gets "
            "another"
        )
    plan.experts.moe_type = "none"
    plan.experts.shape = "neurons"
    plan.arguments.adapter = True
    plan.arguments.log_base_loss = True
    plan.arguments.save_only_trained = not plan.run.save_base


def limit_measuring(
    arguments: MPOETrainingArguments,
    validation: dict[str, list],
    trained: int,
    given: frozenset[str],
) -> int:
    """Keep validation and statistics of an expert's run within about 15% of its training's time.

    Without options that say otherwise, ``validation`` is thinned out in place and
    ``arguments.eval_steps`` is set.

    Args:
        arguments: of the run.
        validation: encoded items by task.
        trained: items of all steps together.
        given: names of the options that were set.

    Returns:
        Items that the statistics are to be taken from.
    """
    most = int(MEASURED * trained)
    statistics = min(MOST_STATISTICS, trained, max(LEAST_STATISTICS, int(0.4 * most)))
    points = OFTEN if (most - statistics) // (OFTEN + 1) >= ENOUGH else 1
    if not given & {"eval_steps", "eval_strategy", "do_eval"}:
        arguments.eval_steps = math.ceil(arguments.max_steps / points)
    if "n_val" not in given:
        per_task = max(LEAST_VALIDATION, (most - statistics) // (points + 1)) // len(validation)
        for task, task_items in validation.items():
            validation[task] = spread(task_items, max(1, per_task))
    items = sum(map(len, validation.values()))
    if arguments.process_index == 0:
        print(
            f"validation: {items} items, {points + 1} times with the base's; statistics: "
            f"{statistics} items ({trained} are trained on)"
        )
    return statistics


def spread(items: list, most: int) -> list:
    """At most so many of the items, evenly spaced."""
    if len(items) <= most:
        return items
    return [items[place * len(items) // most] for place in range(most)]


def losses_beside_base(trainer: Any, sizes: Mapping[str, Mapping[str, int]]) -> dict:
    """The last evaluation of an expert's run, as `evaluate_tasks` returns scores: losses in nats
    per predicted token of the base with its expert and of the base. Every process takes part in
    it."""
    step = trainer.state.global_step

    def logged() -> dict[str, float]:
        """All that was logged of the last step."""
        records = [record for record in trainer.state.log_history if record["step"] == step]
        return {name: value for record in records for name, value in record.items()}

    if not any(name.startswith("eval_") for name in logged()):
        trainer.evaluate()
    last = logged()
    evaluated = [task for task, counts in sizes.items() if "validation" in counts]
    scores: dict[str, dict[str, float]] = {}
    for task in evaluated:
        prefix = "eval_" if len(evaluated) == 1 else f"eval_{task}_"
        scores[task] = {
            "loss": last[f"{prefix}loss"],
            "base_loss": last[f"{prefix}base_loss"],
            "items": sizes[task]["validation"],
        }
    return {"scores": scores, "mean": average_score(scores), "constant": {}, "remarks": []}


def show_losses(evaluated: Mapping, title: str) -> None:
    """Print what `losses_beside_base` returned."""
    rows = []
    for task, score in evaluated["scores"].items():
        losses = (score["base_loss"], score["loss"], score["loss"] - score["base_loss"])
        rows.append([task, f"{score['items']:,}", *(f"{loss:.4f}" for loss in losses)])
    header = ("", "items", "base", "with its expert", "difference")
    Table(header, rows, title, "In nats per predicted token.").show()


def stage_expert(
    trainer: Any,
    tokenizer: Any,
    items: Subset,
    plan: Plan,
    sizes: dict,
    seconds: float,
) -> Expert:
    """Write the expert of a finished run, with statistics of some training items, into the staging
    folder of the run's, and return it.

    ``items`` are those of the statistics; ``sizes`` are the numbers of items by task, for the
    file's facts; ``seconds`` what training took, validation included.
    """
    begun = time.perf_counter()
    print(f"statistics of {len(items)} items for the routers of later mixtures", flush=True)
    statistics = collect_statistics(
        trainer.model, DataLoader(items, AT_ONCE, collate_fn=trainer.data_collator)
    )
    facts = {
        "steps": trainer.state.global_step,
        "learning_rate": plan.arguments.learning_rate,
        "tasks": plan.data.tasks,
        "data": sizes,
    }
    staging = staging_folder(Path(str(plan.arguments.output_dir)))
    staging.mkdir(exist_ok=True)
    expert = save_expert(
        trainer.model,
        staging / f"{plan.run.expert}.expert",
        statistics=statistics,
        tokenizer=tokenizer,
        training=facts,
    )
    collected = time.perf_counter() - begun
    validated = sum(
        value
        for record in trainer.state.log_history
        for name, value in record.items()
        if name.startswith("eval_") and name.endswith("_runtime")
    )
    training = seconds - validated
    if training > 0:
        share = (validated + collected) / training
        print(
            f"training took {training:.1f} s; validation {validated:.1f} s and statistics "
            f"{collected:.1f} s, together {share:.0%} of that"
        )
    return expert


def show_expert(
    model: Any,
    tokenizer: Any,
    expert: Expert,
    held_out: Sequence,
    folder: Path,
    source: Source,
) -> None:
    """Print what the published expert of a run changes beside its base, always on and composed with
    *none*, and note the losses in its file.

    ``model`` is the base with the expert, ``held_out`` are validation items.
    """
    file = folder / f"{expert.name}.expert"
    base = load_model(source)
    if not speaks(base, tokenizer):
        print(f"the expert alone is {file} (mpoe compose)")
        return
    background = made_background(base, tokenizer, folder)
    batches = list(as_batches(held_out, tokenizer))
    changes = changes_of_expert(base, tokenizer, model, expert, batches, background)
    expert.facts["training"] |= facts_of_changes(changes)
    write_expert(expert, file)
    table_of_changes(f"What {expert.name} changes", changes).show()
    print(
        f"the expert alone is {file}; the model with it: mpoe compose {source.path} {file} "
        "--output_dir DIR"
    )
