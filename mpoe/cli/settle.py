"""What a run takes where no option says it: shape, learning rate, length, the order of its items,
intervals."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Subset
from transformers import AutoConfig
from transformers.trainer_utils import IntervalStrategy

from mpoe.cli.errors import CommandError
from mpoe.cli.models import Source
from mpoe.cli.options import DENSE, SWITCH, WIDER
from mpoe.config import MPOEConfig
from mpoe.config.checks import refusing
from mpoe.config.shapes import NEURONS, SEPARABLE
from mpoe.data.task import multitask_batches
from mpoe.models.table import CAUSAL, SEQ2SEQ, TABLE, TYPE_PREFIX
from mpoe.training import MPOETrainingArguments, rates
from mpoe.training.output_dir import read_record

if TYPE_CHECKING:
    from mpoe.cli.train import Plan

_OF_CORES = {
    "tensor_learn",
    "train_AT_index",
    "update_mpo_layer",
}  # training options that only MPO cores have
_EXPERT_OF = {
    CAUSAL: rates.EXPERT,
    SEQ2SEQ: NEURONS,
}  # style of the base -> kind of layers, for its learning rate
MOST_ITEMS = 200_000_000  # per run; their order is drawn beforehand and kept in memory


def settle_experts(plan: Plan, source: Source) -> MPOEConfig | None:
    """The `MPOEConfig` of the conversion, or None if there is none; prints one line about a shape
    that no option named.

    Without a shape the experts are `MPOEConfig`'s default if the model supports it. Afterwards
    ``plan.experts`` holds the choice, like the record of the run.
    """
    experts = plan.experts
    if plan.run.baseline == DENSE:
        return None
    if plan.run.baseline == SWITCH:
        experts.expert_type = "dense"
    if experts.shape is None and plan.given & _OF_CORES:
        experts.shape = SEPARABLE
    config = experts.build()
    if config is None or source.is_mpoe:
        return None
    if not TABLE[source.model_type].takes_blocks:
        config = config.with_cores()
    if experts.shape is None and config.expert_type == "mpo":
        experts.shape = str(config.shape)
        if plan.arguments.process_index == 0:
            why = "what the model or other options need"
            if config.is_hidden:
                why = "what gained most with few experts"
            print(
                f"shape {experts.shape}, {config.top_k} of {config.num_experts} experts per token: "
                f"{why} (--shape)"
            )
    return config


def settle_rate(plan: Plan, source: Source, config: MPOEConfig | None) -> str:
    """Set ``plan.arguments.learning_rate`` if no option did; prints one line about it, and returns
    the reason.

    A resumed run keeps the rate that it was started with. All others get the rate that worked
    (`mpoe.training.rates`).

    Args:
        plan: the run's plan.
        source: the model it starts from.
        config: of the conversion; None for a dense model.
    """
    arguments = plan.arguments
    if "learning_rate" in plan.given:
        return "as given"
    record = read_record(Path(str(arguments.output_dir))) or {} if plan.run.resume else {}
    if "training" in record:  # else another program's run, whose settings are refused later
        arguments.learning_rate = float(record["training"]["learning_rate"])
        return str(record.get("learning_rate_from", "as the run began"))
    kind = rates.kind_of(config) if plan.run.expert is None else _EXPERT_OF[source.style]
    # Transformers has no common exception for invalid values
    with refusing(f"model: the configuration of {source.path} cannot be read: "):
        values = AutoConfig.from_pretrained(source.path)
    if source.is_mpoe:
        config = MPOEConfig.from_dict(values.mpoe)
        kind = rates.kind_of(config)
    elif plan.run.baseline == WIDER:
        kind = rates.kind_of(None)
    rate, reason = rates.recommended_rate(
        source.model_type, int(values.hidden_size), arguments.regime, kind
    )
    arguments.learning_rate = rate
    why = f"what to start from with {reason}"
    if arguments.process_index == 0 and not plan.run.find_rate:
        print(f"learning_rate {rate:g}: {why} (--learning_rate or --find_rate)")
    return why


def warn_of_rate(plan: Plan, source: Source) -> None:
    """Say, before anything else, if no learning rate is known of the model's family and none is
    looked for."""
    arguments = plan.arguments
    chosen = "learning_rate" in plan.given or plan.run.find_rate or plan.run.resume
    kind = _EXPERT_OF[source.style] if plan.run.expert is not None else ""
    known = rates.is_known(source.model_type, arguments.regime, kind)
    if not (chosen or known or arguments.process_index):
        print(
            f"no learning rate is known of {source.model_type.removeprefix(TYPE_PREFIX)}: "
            "--find_rate searches for one, 30 steps with each of three to five"
        )


def search_rate(trainer: Any, items: Any) -> str:
    """Set the trainer's learning rate to the best that a short search on ``items`` finds; returns
    how it was found."""
    arguments = trainer.args
    arguments.learning_rate, losses = rates.find_rate(trainer, items, arguments.learning_rate)
    tried = ", ".join(f"{rate:g} ({loss:.4f})" for rate, loss in losses.items())
    why = f"the least loss on held-out training items after {rates.STEPS} steps of each: {tried}"
    print(f"learning_rate {arguments.learning_rate:g}: {why}")
    return why


def items_of_step(arguments: MPOETrainingArguments) -> int:
    """Of all processes and micro-batches together."""
    per_device = arguments.per_device_train_batch_size
    return per_device * arguments.world_size * arguments.gradient_accumulation_steps


def order_items(
    pools: dict[str, list], arguments: MPOETrainingArguments, temperature: float, seed: int
) -> tuple[Any, int]:
    """The items of a whole run, one task per optimizer step; sets ``arguments.max_steps`` to the
    run's length.

    Returns the items, a `torch.utils.data.Subset` of all, and the steps of one pass over all of
    them.

    The Trainer reads them one after the other. In this order the micro-batches of a step follow
    each other, rank by rank, so accumulation and several processes also see one task per step.
    """
    step = items_of_step(arguments)
    sizes = {name: len(pool) for name, pool in pools.items()}
    per_epoch = math.ceil(sum(sizes.values()) / step)
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * per_epoch)
    if steps * step > MOST_ITEMS:
        raise CommandError(
            f"max_steps x items of a step must be at most {MOST_ITEMS}; got {steps} x {step}"
        )
    order = multitask_batches(sizes, step, steps, temperature, seed)
    arguments.max_steps = steps
    arguments.train_sampling_strategy = "sequential"
    everything: Any = list(itertools.chain(*pools.values()))
    return Subset(everything, order.ravel().tolist()), per_epoch


def set_intervals(arguments: MPOETrainingArguments, per_epoch: int, given: frozenset[str]) -> None:
    """Default intervals for logging (about every 10 steps), evaluation and saving (four times in a
    run).

    The run is one long pass for the Trainer, so "epoch" is converted to steps here.
    """
    quarter = max(1, math.ceil(arguments.max_steps / 4))
    if "dataloader_pin_memory" not in given and arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # otherwise torch warns at every loader
    if not given & {"logging_steps", "logging_strategy"}:
        arguments.logging_steps = min(10, quarter)
    if not given & {"save_steps", "save_strategy"}:
        arguments.save_steps = quarter
        arguments.save_total_limit = arguments.save_total_limit or 2
    if "eval_strategy" not in given and (arguments.do_eval or "do_eval" not in given):
        arguments.eval_strategy = IntervalStrategy.STEPS
        arguments.do_eval = True
        arguments.eval_steps = arguments.eval_steps or quarter
    for kind in ("logging", "save", "eval"):
        strategy = getattr(arguments, f"{kind}_strategy")
        if strategy == "epoch":
            setattr(arguments, f"{kind}_strategy", type(strategy)("steps"))
            setattr(arguments, f"{kind}_steps", per_epoch)
