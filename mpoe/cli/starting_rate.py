"""The learning rate of a run for which none was given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.starting_shape import saved_config

if TYPE_CHECKING:
    from mpoe.cli.pretrained import Source
    from mpoe.cli.train import Plan

_GIVEN = "as given"


def settle_rate(plan: Plan, source: Source, config: Any) -> str:
    """Set ``plan.arguments.learning_rate`` if no option did; prints one line about it, and returns the reason.

    A resumed run keeps the rate that it was started with. A configuration file without a rate keeps the Trainer's own
    default, as it always has. All others get the rate that worked (`mpoe.training.rates`).

    Args:
        plan: the run's plan.
        source: the model it starts from.
        config: the `MPOEConfig` of the conversion; None for a dense model.
    """
    arguments = plan.arguments
    if "learning_rate" in plan.given:
        return _GIVEN
    kept = _rate_of_run(Path(str(arguments.output_dir))) if plan.run.resume else None
    if kept is not None:
        arguments.learning_rate, why = kept
        return why
    rate, reason = _recommended(source, config, arguments.regime)
    if plan.from_file:
        why = f"the Trainer's default, as the file names none; {rate:g} is what to start from with {reason}"
    else:
        arguments.learning_rate = rate
        why = f"what to start from with {reason}"
    if arguments.process_index == 0 and not plan.run.find_rate:
        print(f"learning_rate {arguments.learning_rate:g}: {why} (--learning_rate or --find_rate)")
    return why


def search_rate(trainer: Any, items: list[Any]) -> dict[str, str]:
    """Set the trainer's learning rate to the best that a short search finds; returns what the run's record says."""
    from mpoe.training.rate_search import STEPS, find_rate

    arguments = trainer.args
    arguments.learning_rate, losses = find_rate(trainer, items, arguments.learning_rate)
    tried = ", ".join(f"{rate:g} ({loss:.4f})" for rate, loss in losses.items())
    why = f"the least loss on held-out training items after {STEPS} steps of each: {tried}"
    print(f"learning_rate {arguments.learning_rate:g}: {why}")
    return {"learning_rate_from": why}


def _recommended(source: Source, config: Any, regime: str) -> tuple[float, str]:
    from transformers import AutoConfig

    from mpoe.config import MPOEConfig
    from mpoe.training.rates import kind_of, recommended_rate

    try:
        values = AutoConfig.from_pretrained(source.path)
    except Exception as error:  # Transformers has no common exception for invalid values
        raise CommandError(f"model: the configuration of {source.path} cannot be read: {error}") from error
    if source.is_mpoe:
        config = MPOEConfig.from_dict(values.mpoe)
    return recommended_rate(source.model_type, int(values.hidden_size), regime, kind_of(config))


def _rate_of_run(folder: Path) -> tuple[float, str] | None:
    """The rate that the run in ``folder`` was started with, and where it came from."""
    saved = saved_config(folder) or {}
    try:
        return float(saved["training"]["learning_rate"]), str(saved.get("learning_rate_from", "as the run began"))
    except (ValueError, LookupError, TypeError):
        return None
