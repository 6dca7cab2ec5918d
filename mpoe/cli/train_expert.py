"""`mpoe train --expert NAME`: one expert beside a frozen model, saved as a file that `mpoe compose` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.options import ExpertOptions

if TYPE_CHECKING:
    from mpoe.cli.pretrained import Source
    from mpoe.cli.train import Plan

ITEMS, AT_ONCE = 512, 8  # training items that the router's statistics come from, and of one batch


def settle_expert(plan: Plan, source: Source) -> None:
    """Set what such a run needs: one expert of neurons, everything else frozen.

    Raises:
        CommandError: a name that is no file's, options of mixtures, a model that is one or gets a new head.
    """
    from mpoe.models.table import ENCODER

    name = plan.run.expert
    if not name or Path(name).name != name:
        raise CommandError(f"expert must be a name, which the file has too; got {name!r}")
    mixtures = {field.name for field in dataclasses.fields(ExpertOptions)} - {"neurons", "backend"}
    given = sorted((mixtures | {"baseline", "load_layer"}) & plan.given)
    if given:
        raise CommandError(f"expert trains one expert beside the model; {given[0]} is for mixtures")
    if source.is_mpoe or source.style == ENCODER:
        raise CommandError(f"expert needs a dense language model that stays as it is; {source.path} is or gets another")
    plan.experts.moe_type, plan.experts.shape, plan.arguments.adapter = "none", "neurons", True


def save_trained(trainer: Any, tokenizer: Any, items: Sequence[Any], plan: Plan, folder: Path) -> Path:
    """Write the expert of a finished run, with statistics of the first training items; returns the file."""
    from mpoe.models import collect_statistics, save_expert

    parts = (items[start : start + AT_ONCE] for start in range(0, min(len(items), ITEMS), AT_ONCE))
    statistics = collect_statistics(trainer.model, (trainer.data_collator(part) for part in parts))
    facts = {
        "steps": trainer.state.global_step,
        "learning_rate": plan.arguments.learning_rate,
        "tasks": plan.data.tasks,
    }
    file = folder / f"{plan.run.expert}.expert"
    save_expert(trainer.model, file, statistics=statistics, tokenizer=tokenizer, training=facts)
    print(f"the expert alone is {file} (mpoe compose)")
    return file
