"""What `mpoe train --expert` does besides: its settings, how long it trains, as much validation as
training can afford, losses beside the base's, and the expert's file."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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
from mpoe.data.encode import Item, as_batches
from mpoe.data.metrics import average_score
from mpoe.data.task import Task
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
LEAST_VALIDATION, ENOUGH = 10, 16  # items; with as many as the latter, at `OFTEN` points of a run
OFTEN = 8
AT_ONCE = 8  # training items of a batch that the statistics of an expert's router come from
# Of a run whose length no option says: one pass over the folder, at most `MOST_STEPS`.
STEP_TOKENS = 512
MOST_STEPS = 400
# A pass over little text is shorter than this. Up to four times, text is worth almost as much as
# other text (Muennighoff et al. 2023, arXiv 2305.16264).
FEW_STEPS, MOST_PASSES = 40, 4
CHARACTERS = 10  # of a token at most, on average
TIMED_STEPS = 2
GIVEN_LENGTHS = {"max_steps", "num_train_epochs"}  # options that say how long a run is


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a run trains on if nobody says how long it is.

    Attributes:
        tokens, held_out: in the folder, to train on and held out; of a large one as counted in a
            part of it.
        steps: of the optimizer.
        step_tokens: of each, in the mean.
    """

    tokens: int
    held_out: int
    steps: int
    step_tokens: float

    @property
    def trained(self) -> int:
        """Tokens that are trained on, each counted once."""
        return min(self.tokens, round(self.steps * self.step_tokens))

    def lines(self) -> list[str]:
        """In words, what is left out too."""
        step = round(self.step_tokens)
        passes = self.steps * self.step_tokens / self.tokens
        again = f", {passes:.1f} times" if passes > 1.05 else ""
        lines = [
            f"data: {self.tokens:,} tokens to train on, {self.held_out:,} held out",
            f"plan: {self.steps} steps of {step} tokens read {self.trained:,} of them{again}",
        ]
        if self.trained < 0.95 * self.tokens:
            every = math.ceil(self.tokens / self.step_tokens)
            lines.append(
                f"left out: {1 - self.trained / self.tokens:.1%} of the text (--max_steps {every} "
                "reads all of it)"
            )
        if self.steps < FEW_STEPS:
            lines.append(
                f"little text: {FEW_STEPS} steps need {FEW_STEPS * step // MOST_PASSES:,} tokens; "
                "expect a small gain"
            )
        return lines


def encode_part(
    task: Task, encode: Callable[[Task, str], list[Item]], split: str = "train"
) -> tuple[list[Item], int]:
    """Items of a task's split, of which a plan needs no more, evenly spread over it; and the tokens
    of all of it, as counted in these."""
    examples = task.examples(split)
    sizes = [len(example.source) + len(example.target) for example in examples]
    most = CHARACTERS * MOST_STEPS * STEP_TOKENS
    part = spread(list(zip(examples, sizes, strict=True)), len(sizes) * most // max(1, sum(sizes)))
    chosen = tuple(example for example, _ in part)
    items = encode(dataclasses.replace(task, rows=lambda _: chosen, to_text=None), split)
    tokens = sum(len(item["input_ids"]) for item in items)
    return items, round(tokens * sum(sizes) / sum(size for _, size in part))


def short_enough(task: Task, tokenizer: Any) -> Task:
    """The task; of running text that has not one block held out, with shorter blocks."""
    if task.kind != "language_modeling":
        return task
    length = task.max_source_length
    held_out = "".join(example.source for example in task.validation())[: CHARACTERS * length]
    tokens = len(tokenizer(held_out, add_special_tokens=False, verbose=False)["input_ids"])
    return dataclasses.replace(task, max_source_length=max(2, min(length, tokens)))


def plan_budget(
    arguments: MPOETrainingArguments,
    pools: Mapping[str, Sequence[Item]],
    tokens: int,
    held_out: Mapping[str, Sequence[Item]],
    given: frozenset[str],
) -> Budget:
    """Choose how long a run is, and how many items a step has if no option says that; sets both.

    Args:
        arguments: of the run.
        pools: items to train on, by task.
        tokens: of all there are to train on.
        held_out: items to validate on, by task.
        given: names of the options that were set.
    """
    lengths = [len(item["input_ids"]) for pool in pools.values() for item in pool]
    length = sum(lengths) / len(lengths)
    together = arguments.world_size * arguments.gradient_accumulation_steps
    if "per_device_train_batch_size" not in given:
        per_device = max(1, round(STEP_TOKENS / length / together))
        arguments.per_device_train_batch_size = per_device
    step_tokens = length * arguments.per_device_train_batch_size * together
    passes = tokens / step_tokens
    most = max(1, round(MOST_STEPS * STEP_TOKENS / step_tokens))
    steps = min(most, math.ceil(max(passes, min(FEW_STEPS, MOST_PASSES * passes))))
    arguments.max_steps = steps
    validated = sum(len(item["input_ids"]) for items in held_out.values() for item in items)
    return Budget(tokens, validated, steps, step_tokens)


def seconds_of_step(trainer: Any, items: Sequence[Item]) -> float:
    """The time of a training step without its optimizer, measured on a few; neither weights nor
    torch's random numbers are others afterwards."""
    arguments = trainer.args
    at_once = arguments.per_device_train_batch_size
    seconds = []
    devices = [arguments.device] if arguments.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for step in range(TIMED_STEPS + 1):  # the first one is not counted
            begun = time.perf_counter()
            rows = [items[(step * at_once + row) % len(items)] for row in range(at_once)]
            trainer.model.train()
            batch = trainer.data_collator(rows).to(arguments.device)
            trainer.model(**batch).loss.backward()
            if devices:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    trainer.model.zero_grad()
    return min(seconds[1:]) * arguments.gradient_accumulation_steps


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


def most_memory() -> int | None:
    """Bytes that were in use at once so far: of the GPU, or of the process; None on Windows."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # of Linux and macOS alone

    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def show_budget(budget: Budget, trainer: Any, items: Sequence[Item]) -> None:
    """Print what a run is about to do, its time and its memory as a few steps tell."""
    seconds = seconds_of_step(trainer, items)
    minutes = budget.steps * seconds * (1 + MEASURED / 2) / 60
    memory = most_memory()
    # training keeps two moments, and the table at the end another copy of the model
    copies = sum(p.nbytes * (3 if p.requires_grad else 1) for p in trainer.model.parameters())
    shown = "" if memory is None else f", {(memory + copies) / 1e9:.1f} GB"
    print(
        "\n".join(budget.lines())
        + f"\nabout {minutes:.1f} minutes of training ({seconds:.2f} s a step){shown}; it stops "
        "early when the held-out loss has not fallen for three looks",
        flush=True,
    )


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
