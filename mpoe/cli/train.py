"""`mpoe train [CONFIG.json|yaml] --flag value ...`: convert, train, evaluate, save. Flags override the file."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError
from mpoe.cli.finish import finish, parameters_of, save_trained
from mpoe.cli.options import (
    DENSE,
    WIDER,
    ArmOptions,
    ExperimentOptions,
    ExpertOptions,
    MeasureOptions,
    ModelOptions,
)
from mpoe.cli.parsing import option, read_command
from mpoe.cli.settle import (
    OrderedItems,
    model_of_experiment,
    order_items,
    search_rate,
    set_intervals,
    settle_experts,
    settle_rate,
    start_of,
)
from mpoe.cli.tasks import DataOptions

if TYPE_CHECKING:
    from mpoe.cli.pretrained import Source
    from mpoe.data.spec import TaskSpec
    from mpoe.data.task import Task
    from mpoe.training import MPOETrainingArguments


# what `mpoe train --help` shows
FIRST = {
    "model": "t5 or gpt2 (tiny stand-ins), a folder, or a hub name (t5)",
    "data_dir": "folder with train, validation and test files, or owner/name on the hub",
    "tasks": "tasks by name, instead: folders in data_dir, rte, imdb, doc_module, ...",
    "output_dir": "folder of the run: checkpoints, metrics, report, the final model",
    "num_experts": "experts of every feed-forward layer (8)",
    "top_k": "experts per token (2; 1 of shapes other than hidden)",
    "shape": "hidden, separable, paper, light: what the experts own (hidden)",
    "baseline": "dense, wider or switch: what the mixture is compared with",
    "expert": "train one expert as a file, NAME.expert, for mpoe compose",
    "adapter": "train experts and routers alone",
    "max_steps": "optimizer steps",
    "num_train_epochs": "or passes over the data (3)",
    "per_device_train_batch_size": "items per step and device (8)",
    "learning_rate": "default: chosen by family, shape and width",
    "find_rate": "search for it first: 30 steps with each of three to five",
    "max_source_length": "tokens of the input, or of a block of running text (128)",
    "max_target_length": "tokens of the answer (16)",
    "seed": "of routers, dropout and the order of the data (42)",
    "use_cpu": "stay on the CPU",
    "overwrite": "replace the run in output_dir",
    "resume": "continue the run in output_dir at its last checkpoint",
}


@dataclass
class RunOptions:
    """Options of the run itself."""

    _argument_group_name = "run"

    overwrite: bool = option(False, "replace the run in output_dir")
    find_rate: bool = option(
        False, "search for the learning rate first: 30 steps with each of three to five, judged on held-out items"
    )
    expert: str | None = option(
        None, "train one expert of --neurons beside the model, which stays frozen, and save it as NAME.expert too"
    )
    resume: bool = option(False, "continue the run in output_dir at its last checkpoint")


@dataclass(frozen=True)
class Plan:
    """The checked settings of a run.

    ``given`` names the options that were set, ``from_file`` says whether a configuration file set some, and ``command``
    is the command as typed.
    """

    run: RunOptions
    model: ModelOptions
    data: DataOptions
    experts: ExpertOptions
    arguments: MPOETrainingArguments
    given: frozenset[str]
    experiment: ExperimentOptions
    measure: MeasureOptions
    arm: ArmOptions = field(default_factory=ArmOptions)
    from_file: bool = False
    command: str = ""


GROUPS = (RunOptions, ModelOptions, DataOptions, ArmOptions, ExpertOptions, ExperimentOptions, MeasureOptions)


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    from transformers import Seq2SeqTrainingArguments

    from mpoe.training import MPOETrainingArguments

    groups = [*GROUPS, MPOETrainingArguments]
    usage = "mpoe train [CONFIG.json|yaml] --output_dir DIR [--flag value ...]"
    asked = read_command(usage, __doc__, groups, arguments, 1, True, Seq2SeqTrainingArguments, FIRST)
    if asked is None:
        return
    options, model, data, arm, experts, experiment, measure, training = asked.options
    typed = shlex.join(["mpoe", "train", *arguments])
    given, from_file = frozenset(asked.given), bool(asked.words)
    run(Plan(options, model, data, experts, training, given, experiment, measure, arm, from_file, typed))


def run(plan: Plan) -> dict[str, Any]:
    """Train as planned; returns what ``results.json`` holds.

    Raises:
        ValueError, TypeError: settings that do not fit together, before anything is written.
    """
    from mpoe.cli.convert import show_parameters
    from mpoe.cli.pretrained import find, labels_for, load_tokenizer
    from mpoe.cli.scoring import encode_task
    from mpoe.cli.tasks import read_descriptions, resolve
    from mpoe.models.table import ENCODER
    from mpoe.training.run_lock import hold

    arguments = plan.arguments
    folder = _output_folder(plan)
    source = find(start_of(plan.experiment, plan.model.model, "model" in plan.given))
    if plan.run.expert is not None:
        _settle_expert(plan, source)
    config = settle_experts(plan, source)
    if folder.exists() and Path(source.path).is_dir() and folder.samefile(source.path):
        raise CommandError(f"output_dir must be another folder than the model's; got {folder} for both")
    changing = _mixture_options(plan)
    if source.is_mpoe and changing:
        raise CommandError(
            f"model {source.path!r} is converted already ({source.model_type}): {', '.join(changing)} cannot be "
            "changed any more"
        )
    data_seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    described = read_descriptions(plan.data.task_file)
    find_tasks = partial(resolve, options=plan.data, style=source.style, data_seed=data_seed, described=described)
    tasks = find_tasks(plan.data.tasks)
    eval_tasks = find_tasks(plan.data.eval_tasks) if plan.data.eval_tasks else tasks
    for split, owners in (("train", tasks), ("validation", eval_tasks)):
        for task in owners:
            task.examples(split)  # a missing split is refused before the model is loaded
    tokenizer = load_tokenizer(source)
    labels = labels_for(source, tasks[0]) if source.style == ENCODER else None
    encode = partial(encode_task, tokenizer=tokenizer, style=source.style, labels=labels or ())
    items, validation = _encode(encode, tasks, eval_tasks, plan, data_seed)
    rate_from = settle_rate(plan, source, None if plan.arm.baseline in (DENSE, WIDER) else config)
    settings = {**settings_of(plan, described), "command": plan.command, "learning_rate_from": rate_from}
    _check_folder(plan, settings)
    model = _prepare_model(source, config, plan, labels)
    trainer = make_trainer(model, tokenizer, items, validation, plan)
    if plan.measure.print_num_parameters and trainer.is_world_process_zero():
        trains = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        show_parameters({**parameters_of(trainer.model), "trainable": trains})
    if plan.run.find_rate and not plan.run.resume:
        settings |= search_rate(trainer, items.items)
        settings["training"]["learning_rate"] = arguments.learning_rate
    with hold(folder) if arguments.process_index == 0 else contextlib.nullcontext():
        checkpoint = _claim_folder(folder, plan, settings)
        start = time.perf_counter()
        with going_on(folder, plan.command):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
        results = finish(trainer, tokenizer, eval_tasks, plan, folder, seconds, _sizes(items, validation))
        if plan.run.expert is not None and trainer.is_world_process_zero():
            save_trained(trainer, tokenizer, items.items, plan, folder)
        return results


def _output_folder(plan: Plan) -> Path:
    from mpoe.training.output_dir import check_folder

    if "output_dir" not in plan.given or not plan.arguments.output_dir:
        raise CommandError("train needs --output_dir: the folder for checkpoints, metrics and the final model")
    folder = check_folder("output_dir", Path(plan.arguments.output_dir))
    if plan.run.find_rate and "learning_rate" in plan.given:
        raise CommandError("find_rate looks for the learning rate; give --find_rate or --learning_rate, not both")
    _check_folder(plan)
    return folder


def _check_folder(plan: Plan, settings: dict[str, Any] | None = None) -> None:
    """Refuse a folder with another run or nothing to resume; with ``settings``, also a run with other settings."""
    from mpoe.training.output_dir import check_output_dir

    if plan.arguments.process_index == 0:  # a slower process may check after the first one has claimed the folder
        check_output_dir(plan.arguments.output_dir, plan.run.overwrite, plan.run.resume, settings)


def _mixture_options(plan: Plan) -> list[str]:
    """Given options that describe a mixture, or what it is compared with."""
    names = {f.name for kind in (ExpertOptions, ArmOptions) for f in dataclasses.fields(kind)} | {"load_layer"}
    return sorted(name for name in names & plan.given if name != "load_layer" or plan.experiment.load_layer)


def _settle_expert(plan: Plan, source: Source) -> None:
    """Set what a run with --expert needs: one expert of neurons, everything else frozen."""
    from mpoe.models.table import ENCODER

    name = plan.run.expert
    if not name or Path(name).name != name:
        raise CommandError(f"expert must be a name, which the file has too; got {name!r}")
    mixtures = set(_mixture_options(plan)) - {"neurons", "backend"}
    if mixtures:
        raise CommandError(f"expert trains one expert beside the model; {min(mixtures)} is for mixtures")
    if source.is_mpoe or source.style == ENCODER:
        raise CommandError(f"expert needs a dense language model that stays as it is; {source.path} is or gets another")
    plan.experts.moe_type, plan.experts.shape, plan.arguments.adapter = "none", "neurons", True


def _prepare_model(source: Source, config: Any, plan: Plan, labels: Sequence[str] | None) -> Any:
    """The model to train: converted, unless it already is or stays dense; an encoder with a head for ``labels``."""
    from transformers import set_seed

    from mpoe.cli.pretrained import load_model
    from mpoe.models import convert_to_mpoe
    from mpoe.models.widen import hidden_size_as_mixture, widened

    set_seed(plan.arguments.seed)  # for a new head
    model = load_model(source, labels)
    if config is not None and not source.is_mpoe:
        set_seed(plan.arguments.seed)  # for the routers
        if plan.arm.baseline == WIDER:
            hidden = hidden_size_as_mixture(model, config)
            model = widened(model, hidden)
            print(f"baseline wider: hidden size {hidden}, {sum(p.numel() for p in model.parameters()):,} parameters")
            return model
        model = convert_to_mpoe(model, config)
    take_layers(model, plan.experiment)
    return model


def take_layers(model: Any, options: ExperimentOptions) -> None:
    """Load components of the earlier run into a newly converted model."""
    if not options.load_layer:
        return
    if not hasattr(model, "mpoe_config"):
        raise CommandError("load_layer needs a model with MPO layers; this one stays dense")
    from mpoe.models import load_layers

    names = load_layers(model, model_of_experiment(str(options.load_experiment)), options.load_layer)
    print(f"{len(names)} modules ({', '.join(options.load_layer)}) from {options.load_experiment}")


def _encode(
    encode: Callable[..., list[Any]], tasks: Sequence[Task], eval_tasks: Sequence[Task], plan: Plan, data_seed: int
) -> tuple[OrderedItems, dict[str, list[Any]]]:
    """Training items, in order, and validation items by task; sets the run's length and intervals."""
    arguments = plan.arguments
    pools = {task.name: encode(task, "train") for task in tasks}
    dataset, per_epoch = order_items(pools, arguments, plan.data.temperature, data_seed)
    set_intervals(arguments, per_epoch, plan.given)
    validation = {task.name: encode(task, "validation") for task in eval_tasks}
    return dataset, validation


def _sizes(items: OrderedItems, validation: dict[str, list[Any]]) -> dict[str, dict[str, int]]:
    """Items by task: to train on, read in all steps, to validate on."""
    kinds = {"train": items.sizes, "seen": items.seen(), "validation": {t: len(v) for t, v in validation.items()}}
    return {
        task: {kind: counts[task] for kind, counts in kinds.items() if task in counts}
        for task in dict.fromkeys([*items.sizes, *validation])
    }


def make_trainer(
    model: Any, tokenizer: Any, dataset: OrderedItems, validation: dict[str, list[Any]], plan: Plan
) -> Any:
    """An `MPOETrainer` over the items; it has its metrics and checkpoints in ``output_dir``."""
    from mpoe.data.collate import PaddingCollator
    from mpoe.training import MPOETrainer

    trainer = MPOETrainer(
        model=model,
        args=plan.arguments,
        train_dataset=dataset,
        eval_dataset=next(iter(validation.values())) if len(validation) == 1 else validation,
        data_collator=PaddingCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    show_progress(trainer)
    return trainer


def settings_of(plan: Plan, described: Mapping[str, TaskSpec]) -> dict[str, Any]:
    """Everything that determines the weights of a run, JSON-able: a resumed run must agree with it.

    ``described``: the tasks of ``task_file``, saved because the file may change.
    """
    training = plan.arguments.to_dict()
    # A run may continue with another number of processes if the global batch stays the same.
    training["train_batch_size"] = training.pop("per_device_train_batch_size") * plan.arguments.world_size
    if not training["adapter"]:  # runs that began before there was the option can be resumed
        del training["adapter"]
    return {
        "model": plan.model.model,
        "experiment": dataclasses.asdict(plan.experiment),
        "data": {**dataclasses.asdict(plan.data), "tasks": plan.data.tasks or list(described)},
        "described": {name: spec.to_mapping() for name, spec in described.items()},
        "arm": dataclasses.asdict(plan.arm),
        "experts": dataclasses.asdict(plan.experts),
        "training": training,
    }


def _claim_folder(folder: Path, plan: Plan, settings: dict[str, Any]) -> Path | None:
    """Claim the folder for this run; returns the checkpoint to resume from, if any."""
    from mpoe.training import find_last_checkpoint, prepare_output_dir

    with plan.arguments.main_process_first(desc="output folder"):
        if plan.arguments.process_index != 0:
            return find_last_checkpoint(folder) if plan.run.resume else None
        checkpoint = prepare_output_dir(folder, plan.run.overwrite, plan.run.resume, settings)
    if plan.run.resume:
        print(f"resuming from {checkpoint.name}" if checkpoint else "no complete checkpoint yet: starting at step 0")
    return checkpoint


# ------------------------------------------------------------------ what is shown while a run goes on


def show_progress(trainer: Any) -> None:
    """Print a line for each log call instead of a dictionary; progress bars only on a terminal."""
    from tqdm.auto import tqdm
    from transformers import PrinterCallback, ProgressCallback

    from mpoe.training.callbacks import LogLineCallback

    class Bars(ProgressCallback):
        def on_log(self, *arguments: Any, **keywords: Any) -> None:
            """Do nothing: `LogLineCallback` writes the line."""

    bars = not trainer.args.disable_tqdm and sys.stderr.isatty()
    for shown in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown)
    if bars:
        trainer.add_callback(Bars)
    trainer.add_callback(LogLineCallback(tqdm.write if bars else partial(print, flush=True)))


@contextlib.contextmanager
def going_on(folder: Path, command: str) -> Iterator[None]:
    """Inside this context, an interrupted run prints how to continue."""
    from mpoe.training import find_last_checkpoint

    try:
        yield
    except KeyboardInterrupt:
        checkpoint = find_last_checkpoint(folder)
        where = f"at {checkpoint.name}" if checkpoint else "at step 0, as there is no checkpoint yet"
        words = [word for word in shlex.split(command) if word not in ("--overwrite", "--resume")]
        raise KeyboardInterrupt(f"go on {where} with {shlex.join([*words, '--resume'])}") from None
