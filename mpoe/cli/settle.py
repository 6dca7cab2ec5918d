"""What a run takes where no option says it: shape, learning rate, length, the order of its items, intervals."""

from __future__ import annotations

import bisect
import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.options import DENSE, SWITCH, ExperimentOptions
from mpoe.config import MPOEConfig
from mpoe.config.shapes import SEPARABLE

if TYPE_CHECKING:
    from mpoe.cli.pretrained import Source
    from mpoe.cli.train import Plan
    from mpoe.training import MPOETrainingArguments

_OF_CORES = {"tensor_learn", "train_AT_index", "update_mpo_layer"}  # training options that only MPO cores have
MOST_ITEMS = 200_000_000  # per run; their order is drawn beforehand and kept in memory


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


def saved_config(folder: Path) -> dict[str, Any] | None:
    """The configuration that the run in ``folder`` was started with; None if there is no readable record."""
    from mpoe.training.output_dir import RUN_FILE

    try:
        saved = json.loads((folder / RUN_FILE).read_text())["config"]
    except (OSError, ValueError, LookupError, TypeError):
        return None  # runs that cannot be resumed are refused when the folder is checked
    return saved if isinstance(saved, dict) else None


def settle_experts(plan: Plan, source: Source) -> MPOEConfig | None:
    """The `MPOEConfig` of the run, or None if everything stays dense; prints one line about a shape that no option
    named.

    A resumed run keeps the shape that it was started with. A configuration file without a shape gets separable experts,
    one per token, as it always has. All others get `MPOEConfig`'s default if the model supports it. Afterwards
    ``plan.experts`` holds the choice, like the record of the run.
    """
    from mpoe.models.table import TABLE

    experts, defaults = plan.experts, {"gauge": MPOEConfig.gauge, "light_p": MPOEConfig.light_p}
    record = saved_config(Path(str(plan.arguments.output_dir))) if plan.run.resume else None
    kept = (record or {}).get("experts")
    as_saved = plan.from_file or isinstance(kept, dict)
    if isinstance(kept, dict):
        for name in {"shape", "top_k"} - plan.given:
            setattr(experts, name, kept.get(name))
    if plan.arm.baseline == DENSE:
        return None
    if plan.arm.baseline == SWITCH:
        experts.expert_type = "dense"
    if experts.shape is None and plan.given & _OF_CORES:
        experts.shape = SEPARABLE
    config = experts.build(as_saved)
    if source.is_mpoe:
        config = None if config is None else MPOEConfig.from_dict({})  # the model's own counts
    elif config is not None and not TABLE[source.model_type].takes_blocks:
        config = config.with_cores()
    if experts.shape is None and not isinstance(kept, dict):
        experts.shape = SEPARABLE if config is None else str(config.shape)
        has_shape = config is not None and config.expert_type == "mpo" and not source.is_mpoe
        if config is not None and has_shape and plan.arguments.process_index == 0:
            why = "as the file names none" if plan.from_file else "what gained most in our trials"
            why = why if config.is_hidden or plan.from_file else "what the model or other options need"
            print(f"shape {experts.shape}, {config.top_k} of {config.num_experts} experts per token: {why} (--shape)")
    if config is not None and config.keeps_network and not as_saved:
        experts.top_k = config.top_k
    for name, value in defaults.items():
        setattr(experts, name, getattr(experts, name) or value)
    return config


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
        return "as given"
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

    from mpoe.training.rates import kind_of, recommended_rate

    try:
        values = AutoConfig.from_pretrained(source.path)
    except Exception as error:  # Transformers has no common exception for invalid values
        raise CommandError(f"model: the configuration of {source.path} cannot be read: {error}") from error
    kind = kind_of(MPOEConfig.from_dict(values.mpoe) if source.is_mpoe else config)
    return recommended_rate(source.model_type, int(values.hidden_size), regime, kind)


def _rate_of_run(folder: Path) -> tuple[float, str] | None:
    """The rate that the run in ``folder`` was started with, and where it came from."""
    saved = saved_config(folder) or {}
    try:
        return float(saved["training"]["learning_rate"]), str(saved.get("learning_rate_from", "as the run began"))
    except (ValueError, LookupError, TypeError):
        return None


class OrderedItems:
    """Items in the order in which a run reads them: a map-style dataset over ``order``.

    Args:
        pools: the items of every task.
        order: indices into the concatenation of all pools.
    """

    def __init__(self, pools: Mapping[str, Sequence[Any]], order: Sequence[int]) -> None:
        self.items = [item for pool in pools.values() for item in pool]
        self.sizes = {name: len(pool) for name, pool in pools.items()}
        self.order = order

    def seen(self) -> dict[str, int]:
        """How many items of each task the run reads, repetitions included."""
        ends = list(itertools.accumulate(self.sizes.values()))
        owners = Counter(bisect.bisect_right(ends, index) for index in self.order)
        return {name: owners[k] for k, name in enumerate(self.sizes)}

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Any:
        return self.items[self.order[index]]


def order_items(
    pools: dict[str, list[Any]], arguments: MPOETrainingArguments, temperature: float, seed: int
) -> tuple[OrderedItems, int]:
    """The items of a whole run, one task per optimizer step; sets ``arguments.max_steps`` to the run's length.

    Returns the items, and the steps of one pass over all of them.

    The Trainer reads them one after the other. In this order the micro-batches of a step follow each other, rank by
    rank, so accumulation and several processes also see one task per step.
    """
    from mpoe.data.sampler import MultiTaskBatchSampler

    accumulation, ranks = arguments.gradient_accumulation_steps, arguments.world_size
    batch = arguments.per_device_train_batch_size * ranks
    per_epoch = math.ceil(sum(map(len, pools.values())) / (batch * accumulation))
    steps = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * per_epoch)
    if steps * batch * accumulation > MOST_ITEMS:
        raise CommandError(
            f"max_steps x batch x accumulation must be at most {MOST_ITEMS}; got {steps} x {batch} x {accumulation}"
        )
    sampler = MultiTaskBatchSampler(
        {name: len(pool) for name, pool in pools.items()},
        batch_size=batch,
        num_steps=steps,
        temperature=temperature,
        seed=seed,
        accumulation=accumulation,
    )
    arguments.max_steps = steps
    arguments.train_sampling_strategy = "sequential"
    return OrderedItems(pools, [index for micro_batch in sampler for index in micro_batch]), per_epoch


def set_intervals(arguments: MPOETrainingArguments, per_epoch: int, given: frozenset[str]) -> None:
    """Default intervals for logging (about every 10 steps), evaluation and saving (four times in a run).

    The run is one long pass for the Trainer, so "epoch" is converted to steps here.
    """
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    quarter = max(1, math.ceil(arguments.max_steps / 4))
    if "dataloader_pin_memory" not in given and arguments.device.type == "cpu":
        arguments.dataloader_pin_memory = False  # otherwise torch warns at every loader
    if not given & {"logging_steps", "logging_strategy"}:
        arguments.logging_steps = min(10, quarter)
    if not given & {"save_steps", "save_strategy"}:
        arguments.save_steps = quarter
        arguments.save_total_limit = arguments.save_total_limit or 2
    if not given & {"eval_steps", "eval_strategy", "do_eval"}:
        arguments.eval_strategy, arguments.eval_steps, arguments.do_eval = IntervalStrategy.STEPS, quarter, True
    for kind, enum in (("logging", IntervalStrategy), ("save", SaveStrategy), ("eval", IntervalStrategy)):
        if getattr(arguments, f"{kind}_strategy") == "epoch":
            setattr(arguments, f"{kind}_strategy", enum("steps"))
            setattr(arguments, f"{kind}_steps", per_epoch)
