"""`mpoe evaluate MODEL_DIR`: scores of a saved model on a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import parse
from mpoe.cli.tasks import DataOptions

SPLITS = ("train", "validation", "test")


@dataclass
class EvaluateOptions:
    """Options of `evaluate` alone."""

    _argument_group_name = "evaluation"

    split: str = field(default="test", metadata={"help": "train, validation or test"})
    batch_size: int = field(
        default=128, metadata={"help": "items per batch", "aliases": ["--per_device_eval_batch_size"]}
    )
    data_seed: int = field(default=0, metadata={"help": "seed of subsets and of split_validation_test"})
    load_experiment: str | None = field(
        default=None, metadata={"help": "folder of a run, in the place of MODEL_DIR: its model or last checkpoint"}
    )
    output_file: str | None = field(default=None, metadata={"help": "also write the scores here, as JSON"})

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {self.split!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {self.batch_size}")


def command(arguments: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Run the command on its tokens; returns the scores by task."""
    if not arguments or any(a in ("-h", "--help") for a in arguments):
        from mpoe.cli.usage import show_options

        show_options("mpoe evaluate MODEL_DIR [--flag value ...]", __doc__, [EvaluateOptions, DataOptions])
        return None
    given = None if arguments[0].startswith("--") else arguments[0]
    (options, data), _ = parse([EvaluateOptions, DataOptions], arguments[given is not None :])
    model_dir = _model_dir(given, options.load_experiment)
    from mpoe.cli.files import check_writable_file, write_json
    from mpoe.cli.pretrained import ENCODER, find, load_model, load_tokenizer
    from mpoe.cli.tasks import resolve

    if options.output_file:
        check_writable_file("output_file", Path(options.output_file))
    source = find(model_dir)
    if source.style == ENCODER:
        raise CommandError(
            f"{model_dir} is an encoder ({source.model_type}); evaluate takes T5, GPT-2 and Llama models"
        )
    tasks = resolve(data.eval_tasks or data.tasks, data, source.style, options.data_seed)
    for task in tasks:
        task.examples(options.split)  # a split that is not there is refused before the model is loaded
    tokenizer, model = load_tokenizer(source), load_model(source)
    from mpoe.cli.scoring import evaluate_tasks, show_scores

    scores = evaluate_tasks(model, tokenizer, tasks, options.split, options.batch_size)
    show_scores(scores, f"{model_dir} on {options.split}")
    if options.output_file:
        write_json(Path(options.output_file), {"model": model_dir, "split": options.split, "scores": scores})
    return scores


def _model_dir(given: str | None, load_experiment: str | None) -> str:
    if (given is None) == (load_experiment is None):
        raise CommandError("evaluate needs a model first: mpoe evaluate MODEL_DIR, or --load_experiment RUN_DIR")
    if given is not None:
        return given
    from mpoe.cli.experiment import model_of_experiment

    return model_of_experiment(str(load_experiment))
