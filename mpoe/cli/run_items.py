"""The items of a run in order, and when it logs, evaluates and saves."""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError

if TYPE_CHECKING:
    from mpoe.training import MPOETrainingArguments

MOST_ITEMS = 200_000_000  # per run; their order is drawn beforehand and kept in memory


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
