"""`--load_experiment` and `--load_layer`: start a run from an earlier one, in whole or in part."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import option

NOTHING = "noload"  # the original's scripts use it to load nothing


@dataclass
class ExperimentOptions:
    """Options that refer to an earlier run."""

    _argument_group_name = "earlier run"

    load_experiment: str | None = option(
        None, "folder of an earlier run (or of a saved model): train goes on from its model in a run of its own"
    )
    load_layer: list[str] = option(
        [],
        "components (word_embed, mlp, attention, pooler) that are taken from load_experiment instead of "
        "being decomposed again; everything else comes from --model",
    )

    def __post_init__(self) -> None:
        from mpoe.models.components import parse_components

        asked = [value for value in self.load_layer if value != NOTHING]
        self.load_layer = list(parse_components(",".join(asked), "load_layer") or ()) if asked else []
        if self.load_layer and self.load_experiment is None:
            raise ValueError("load_layer needs load_experiment: the run or model whose cores are taken")


def model_of_experiment(folder: str) -> str:
    """The final model of a run, or its last complete checkpoint if the run has not finished.

    Raises: CommandError: no such folder, or it has neither.
    """
    from mpoe.training import find_last_checkpoint

    path = Path(folder)
    if not path.is_dir():
        raise CommandError(f"load_experiment must be the folder of an earlier run; got {folder!r}")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return str(path)
    checkpoint = find_last_checkpoint(path)
    if checkpoint is None:
        raise CommandError(f"load_experiment: {folder} holds neither a model nor a complete checkpoint")
    return str(checkpoint)


def start_of(options: ExperimentOptions, model: str, model_given: bool) -> str:
    """The starting point of a run: the earlier run's model, or ``model``.

    Raises:
        CommandError: both are given.
    """
    if options.load_experiment is None or options.load_layer:
        return model
    if model_given:
        raise CommandError(
            "load_experiment says which model to start from; give it without --model, or add --load_layer"
        )
    return model_of_experiment(options.load_experiment)


def take_layers(model: Any, options: ExperimentOptions) -> None:
    """Load components of the earlier run into a newly converted model."""
    if not options.load_layer:
        return
    assert options.load_experiment is not None  # checked at construction
    if not hasattr(model, "mpoe_config"):
        raise CommandError("load_layer needs a model with MPO layers; this one stays dense")
    from mpoe.models import load_layers

    names = load_layers(model, model_of_experiment(options.load_experiment), options.load_layer)
    print(f"{len(names)} modules ({', '.join(options.load_layer)}) from {options.load_experiment}")
