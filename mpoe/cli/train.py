"""`mpoe train [CONFIG.json|yaml] --flag value ...`: convert, train, evaluate, save. Flags override
the file."""

import contextlib
import dataclasses
import itertools
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Subset
from tqdm import tqdm

from mpoe.cli import models
from mpoe.cli.command import Request, as_command
from mpoe.cli.compare import mixture_of, read_run, write_report
from mpoe.cli.errors import CommandError
from mpoe.cli.evaluate import encode_task, evaluate_tasks, show_scores
from mpoe.cli.expert import (
    GIVEN_LENGTHS,
    encode_part,
    limit_measuring,
    losses_beside_base,
    most_memory,
    plan_budget,
    settle_expert,
    short_enough,
    show_budget,
    show_expert,
    show_losses,
    stage_expert,
)
from mpoe.cli.models import Source
from mpoe.cli.options import WIDER, ExpertOptions, RunOptions, expert_options_of
from mpoe.cli.outputs import REPORT_FILE, RESULTS_FILE, write_json
from mpoe.cli.settle import (
    items_of_step,
    order_items,
    search_rate,
    set_intervals,
    settle_experts,
    settle_rate,
    warn_of_rate,
)
from mpoe.cli.tasks import DataOptions, model_of_experiment, read_descriptions, resolve
from mpoe.data.encode import IGNORED_LABEL, Item, padding_collator
from mpoe.data.predict import is_classifier
from mpoe.data.spec import TaskSpec
from mpoe.data.task import Task
from mpoe.models import convert_to_mpoe, load_layers
from mpoe.models.base import MPOEModelMixin
from mpoe.models.card import write_card
from mpoe.models.find import hidden_size_as_mixture, widened
from mpoe.models.table import CAUSAL, ENCODER, SEQ2SEQ
from mpoe.models.walk import routed_layers, short_name
from mpoe.training import (
    MPOETrainer,
    MPOETrainingArguments,
    find_last_checkpoint,
    prepare_output_dir,
)
from mpoe.training.callbacks import LogLineCallback, ProgressBar, StopWhenFlat
from mpoe.training.checkpoints import step_of
from mpoe.training.output_dir import check_output_dir, publish_run
from mpoe.training.published import check_free_names, staging_folder
from mpoe.training.run_lock import hold
from mpoe_kernels.version import __version__

# What `transformers.TrainingArguments` offer and a run would not heed -> what there is instead.
INSTEAD = {
    "resume_from_checkpoint": "--resume continues the run in output_dir at its last checkpoint",
    "do_predict": "mpoe evaluate RUN_DIR --split test scores a finished run",
    "train_sampling_strategy": "every step draws one task (--temperature, --data_seed)",
}
GROUPS = (RunOptions, DataOptions, ExpertOptions, MPOETrainingArguments)


@dataclass(frozen=True)
class Plan:
    """The checked settings of a run, the names of the options that were set, and the command as
    typed."""

    run: RunOptions
    data: DataOptions
    experts: ExpertOptions
    arguments: MPOETrainingArguments
    given: frozenset[str]
    command: str = ""

    @property
    def mixture_options(self) -> list[str]:
        """Given options that describe a mixture, or what it is compared with."""
        names = expert_options_of(self.given)
        if "baseline" in self.given:
            names.append("baseline")
        if self.run.load_layer:
            names.append("load_layer")
        return names


@as_command(*GROUPS, config=True)
def command(request: Request) -> None:
    """Train as the options say."""
    options, data, experts, arguments = request.options
    run(Plan(options, data, experts, arguments, frozenset(request.given), request.typed))


def run(plan: Plan) -> dict:
    """Train as planned; returns what ``results.json`` holds.

    Raises:
        ValueError, TypeError: settings that do not fit together, before anything is written.
    """
    arguments = plan.arguments
    data = plan.data
    if "output_dir" not in plan.given or not arguments.output_dir:
        raise CommandError(
            "train needs --output_dir: the folder for checkpoints, metrics and the final model"
        )
    folder = Path(arguments.output_dir)
    for name, instead in INSTEAD.items():
        if name in plan.given and getattr(arguments, name):
            raise CommandError(f"{name} is no option of mpoe train: {instead}")
    if plan.run.find_rate and "learning_rate" in plan.given:
        raise CommandError(
            "find_rate looks for the learning rate; give --find_rate or --learning_rate, not both"
        )
    _check_folder(plan)
    start = plan.run.model
    if plan.run.load_experiment is not None and not plan.run.load_layer:
        if "model" in plan.given:
            raise CommandError(
                "load_experiment says which model to start from; leave out --model, or add "
                "--load_layer"
            )
        start = model_of_experiment(plan.run.load_experiment)
    source = models.find_to_copy(start)
    if plan.run.expert is not None:
        settle_expert(plan, source)
    elif plan.run.save_base:
        raise CommandError("save_base is for --expert; other runs save the whole model")
    warn_of_rate(plan, source)
    config = settle_experts(plan, source)
    if source.is_in(folder):
        raise CommandError(
            f"output_dir must be another folder than the model's; got {folder} for both"
        )
    if source.is_mpoe and plan.mixture_options:
        raise CommandError(
            f"model {source.path!r} is converted already ({source.model_type}): "
            f"{', '.join(plan.mixture_options)} cannot be changed any more"
        )
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    described = read_descriptions(data.task_file)
    # Not by the run's seed: mpoe evaluate draws the same items for every run, and for the base.
    drawn_by = arguments.data_seed or 0
    find_tasks = partial(
        resolve, options=data, style=source.style, data_seed=drawn_by, described=described
    )
    tasks = find_tasks(data.tasks)
    eval_tasks = find_tasks(data.eval_tasks) if data.eval_tasks else tasks
    tokenizer = models.load_tokenizer(source)
    labels = models.labels_for(source, tasks[0]) if source.style == ENCODER else None
    encode = partial(encode_task, tokenizer=tokenizer, style=source.style, labels=labels or ())
    is_planned = plan.run.expert is not None and not plan.given & GIVEN_LENGTHS
    if is_planned and "max_source_length" not in plan.given:
        tasks = [short_enough(task, tokenizer) for task in tasks]
        eval_tasks = [short_enough(task, tokenizer) for task in eval_tasks]
    validation = {task.name: encode(task, "validation") for task in eval_tasks}
    if is_planned:
        encoded = {task.name: encode_part(task, encode) for task in tasks}
        pools = {name: part for name, (part, _) in encoded.items()}
        tokens = sum(number for _, number in encoded.values())
        budget = plan_budget(arguments, pools, tokens, validation, plan.given)
    else:
        pools = {task.name: encode(task, "train") for task in tasks}
    items, per_epoch = order_items(pools, arguments, data.temperature, data_seed)
    set_intervals(arguments, per_epoch, plan.given)
    statistics_of = None
    if plan.run.expert is not None:
        chosen = limit_measuring(arguments, validation, len(items), plan.given)
        statistics_of = Subset(items.dataset, items.indices[:chosen])
    rate_from = settle_rate(plan, source, config)
    settings = {
        **settings_of(plan, described),
        "command": plan.command,
        "learning_rate_from": rate_from,
        "drawn_by": drawn_by,
    }
    _check_folder(plan, settings)
    trainer = make_trainer(
        _prepare_model(source, config, plan, labels), tokenizer, items, validation, arguments
    )
    first = arguments.process_index == 0
    if is_planned:
        trainer.add_callback(StopWhenFlat(len(validation)))
        if first and not plan.run.resume:
            show_budget(budget, trainer, items)
    if plan.run.print_num_parameters and first:
        total = f"parameters: {trainer.model.num_parameters():,}"
        getattr(trainer.model, "print_trainable_parameters", partial(print, total))()
    if plan.run.find_rate and not plan.run.resume:
        settings["learning_rate_from"] = search_rate(trainer, items.dataset)
        settings["training"]["learning_rate"] = arguments.learning_rate
    if first:
        for task in tasks:
            show_first_item(task, pools[task.name][0], tokenizer, source.style)
    with hold(folder) if first else contextlib.nullcontext():
        with arguments.main_process_first(desc="output folder"):
            if first:
                _check_folder(plan, settings)  # what is there now, as nobody else writes it
                checkpoint = prepare_output_dir(
                    folder, plan.run.overwrite, plan.run.resume, settings, keep_model=True
                )
            else:
                checkpoint = find_last_checkpoint(folder) if plan.run.resume else None
        if plan.run.resume and first:
            print(
                f"resuming from {checkpoint.name}"
                if checkpoint
                else "no complete checkpoint yet: a new start"
            )
        begun = time.perf_counter()
        with going_on(folder, plan.command):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - begun
        spent = seconds, trainer.state.global_step - (step_of(checkpoint) if checkpoint else 0)
        # Items by task: to train on, read in all steps, to validate on.
        owners = [name for name, pool in pools.items() for _ in pool]
        done = trainer.state.global_step * items_of_step(arguments)  # it may have stopped early
        seen = Counter(owners[index] for index in items.indices[:done])
        sizes = {name: {"train": len(pool), "seen": seen[name]} for name, pool in pools.items()}
        for name, held_out in validation.items():
            sizes.setdefault(name, {})["validation"] = len(held_out)
        staging = staging_folder(folder)
        expert = None
        if plan.run.expert is None or plan.run.save_base:
            trainer.save_model(str(staging))  # every process takes part in it
            if arguments.should_save:
                tokenizer.save_pretrained(staging)
        if statistics_of is not None and first:
            expert = stage_expert(trainer, tokenizer, statistics_of, plan, sizes, seconds)
        if arguments.should_save and staging.is_dir():
            publish_run(folder)
        results = finish(trainer, tokenizer, eval_tasks, plan, start, spent, sizes)
        if expert is not None:
            held_out = list(itertools.chain(*validation.values()))
            show_expert(trainer.model, tokenizer, expert, held_out, folder, source)
        return results


SHOWN = 400  # characters of a first item


def show_first_item(task: Task, item: Item, tokenizer: Any, style: str) -> None:
    """Print a task's first training item as the model reads it, special tokens included."""
    read = tokenizer.decode(item["input_ids"])[:SHOWN]
    labels = item["labels"]
    if style == SEQ2SEQ:
        print(f"first item of {task.name}: {read!r} -> {tokenizer.decode(labels)[:SHOWN]!r}")
    elif style == CAUSAL:
        counted = sum(label != IGNORED_LABEL for label in labels)
        kind = "block" if task.kind == "language_modeling" else "item"
        print(
            f"first {kind} of {task.name}, {len(labels)} tokens, the loss counts {counted}: "
            f"{read!r}"
        )


def _check_folder(plan: Plan, settings: dict | None = None) -> None:
    """Refuse a folder with another run or nothing to resume; with ``settings``, also a run with
    other settings."""
    # a slower process may check after the first one has claimed the folder
    if plan.arguments.process_index == 0:
        check_output_dir(plan.arguments.output_dir, plan.run.overwrite, plan.run.resume, settings)
        if plan.run.expert is not None:
            check_free_names(Path(str(plan.arguments.output_dir)), [f"{plan.run.expert}.expert"])


def _prepare_model(source: Source, config: Any, plan: Plan, labels: Sequence[str] | None) -> Any:
    """The model to train: converted, unless it already is or stays dense; an encoder with a head
    for ``labels``."""
    transformers.set_seed(plan.arguments.seed)  # for a new head
    model = models.load_model(source, labels).float()  # a mixture has the dtype of its files
    if config is not None and plan.run.baseline == WIDER:
        hidden = hidden_size_as_mixture(model, config)
        model = widened(model, hidden)
        print(f"baseline wider: hidden size {hidden}, {model.num_parameters():,} parameters")
    elif config is not None:
        transformers.set_seed(plan.arguments.seed)  # for the routers
        model = convert_to_mpoe(model, config)
    take_layers(model, plan.run)
    return model


def take_layers(model: Any, options: RunOptions) -> None:
    """Load components of the earlier run into a newly converted model."""
    layers = options.load_layer
    if layers:
        names = load_layers(model, model_of_experiment(str(options.load_experiment)), layers)
        print(f"{len(names)} modules ({', '.join(layers)}) from {options.load_experiment}")


def make_trainer(
    model: Any,
    tokenizer: Any,
    items: Any,
    validation: dict[str, list],
    arguments: MPOETrainingArguments,
) -> Any:
    """An `MPOETrainer` over the items; it has its metrics and checkpoints in ``output_dir``."""
    trainer = MPOETrainer(
        model=model,
        args=arguments,
        train_dataset=items,
        eval_dataset=next(iter(validation.values())) if len(validation) == 1 else validation,
        data_collator=padding_collator(tokenizer, has_classes=is_classifier(model)),
        processing_class=tokenizer,
    )
    # a line for each log call in place of dictionaries, and bars where somebody watches
    for shown in (transformers.ProgressCallback, transformers.PrinterCallback):
        trainer.remove_callback(shown)
    has_bar = sys.stderr.isatty() and not arguments.disable_tqdm
    if has_bar:
        trainer.add_callback(ProgressBar())
    trainer.add_callback(LogLineCallback(tqdm.write if has_bar else partial(print, flush=True)))
    return trainer


def settings_of(plan: Plan, described: Mapping[str, TaskSpec]) -> dict:
    """Everything that determines the weights of a run, JSON-able: a resumed run must agree with it.

    ``described``: the tasks of ``task_file``, saved because the file may change.
    """
    training = plan.arguments.to_dict()
    # A run may continue with another number of processes if the global batch stays the same.
    per_device = training.pop("per_device_train_batch_size")
    training["train_batch_size"] = per_device * plan.arguments.world_size
    return {
        "model": plan.run.model,
        "experiment": {name: getattr(plan.run, name) for name in ("load_experiment", "load_layer")},
        "data": {**dataclasses.asdict(plan.data), "tasks": plan.data.tasks or list(described)},
        "described": {name: spec.to_mapping() for name, spec in described.items()},
        "arm": {"baseline": plan.run.baseline},
        "experts": dataclasses.asdict(plan.experts),
        "training": training,
    }


@contextlib.contextmanager
def going_on(folder: Path, command: str) -> Iterator[None]:
    """Inside this context, an interrupted run prints how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        checkpoint = find_last_checkpoint(folder)
        where = checkpoint.name if checkpoint else "step 0, as there is no checkpoint yet"
        words = [word for word in shlex.split(command) if word not in ("--overwrite", "--resume")]
        raise KeyboardInterrupt(
            f"go on at {where} with {shlex.join([*words, '--resume'])}"
        ) from None


def finish(
    trainer: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    plan: Plan,
    start: str,
    spent: Any,
    sizes: dict,
) -> dict:
    """Evaluate the model on the tasks' validation items and write the results, which are returned.

    Args:
        trainer: of the finished training, on which this process ``spent`` seconds and steps.
        tokenizer, plan: of the run.
        tasks: to evaluate on.
        start: the model that the run started from.
        sizes: of the data, for the record.
    """
    arguments = plan.arguments
    model = trainer.model
    folder = Path(str(arguments.output_dir))
    seconds, done = spent
    steps = trainer.state.global_step
    is_expert = plan.run.expert is not None
    evaluated = losses_beside_base(trainer, sizes) if is_expert else {}
    if not trainer.is_world_process_zero():
        return {}
    if not is_expert:
        at_once = arguments.per_device_eval_batch_size * 4
        evaluated = evaluate_tasks(model, tokenizer, tasks, "validation", at_once)
    parameters = dict.fromkeys(("total", "trainable"), model.num_parameters())
    device = f"{arguments.device.type}, {torch.get_num_threads()} threads"
    if arguments.device.type == "cuda":
        device = torch.cuda.get_device_name(arguments.device)
    if isinstance(model, MPOEModelMixin):
        parameters = model.parameter_report()
        scores = {f"validation, {task}": values for task, values in evaluated["scores"].items()}
        write_card(model, folder, scores)
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    results: dict = {
        "model": start,
        "class": type(model).__name__,
        "mixture": mixture_of(model),
        "layers": [short_name(name) for name, _ in routed_layers(model)],
        "data": sizes,
        "made_with": {
            "mpoe": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": device,
        },
        "steps": steps,
        "seconds": round(seconds, 2),
        "train_loss": losses[-1] if losses else None,
        "validation": evaluated["scores"],
        "mean_validation": evaluated["mean"],
        "constant": evaluated["constant"],
        "remarks": evaluated["remarks"],
        "parameters": parameters,
        **measured(plan.run, seconds, done, items_of_step(arguments)),
    }
    write_json(folder / RESULTS_FILE, results)
    write_report(folder / REPORT_FILE, [read_run(str(folder))])
    (show_losses if is_expert else show_scores)(evaluated, f"validation after {steps} steps")
    model_too = "" if is_expert and not plan.run.save_base else "model, "
    print(f"{model_too}metrics.jsonl, {RESULTS_FILE} and {REPORT_FILE} are in {folder}")
    return results


def measured(options: RunOptions, seconds: float, steps: int, items: int) -> dict:
    """The requested measurements of ``steps`` steps of ``items`` items each, JSON-able; also prints
    them."""
    report: dict = {}
    if options.compute_time and steps:  # none after a run that was resumed at its end
        rates = {"seconds_per_step": seconds / steps, "items_per_second": items * steps / seconds}
        report["time"] = {"train_seconds": seconds, **rates}
        print(f"training took {seconds:.1f} s: {seconds / steps:.3f} s per step of {items} items")
    if options.compute_memory:
        device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else "cpu"
        peak = most_memory()
        report["memory"] = {"device": device, "peak_bytes": peak}
        shown = "unknown" if peak is None else f"{peak / 2**20:.0f} MiB"
        print(f"most memory used ({device}): {shown}")
    return report
