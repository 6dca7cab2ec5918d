"""`mpoe evaluate MODEL_DIR`: scores of a saved model on a split."""

from __future__ import annotations

import json
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
    data_seed: int | None = field(
        default=None, metadata={"help": "seed of subsets and of split_validation_test; default: that of the run, or 0"}
    )
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
    seed = _data_seed_of_run(model_dir) if options.data_seed is None else options.data_seed
    tasks = resolve(data.eval_tasks or data.tasks, data, source.style, seed)
    for task in tasks:
        task.examples(options.split)  # a split that is not there is refused before the model is loaded
    tokenizer, model = load_tokenizer(source), load_model(source)
    from mpoe.cli.scoring import evaluate_tasks, show_scores
    from mpoe.data.tasks import average_score

    scores = evaluate_tasks(model, tokenizer, tasks, options.split, options.batch_size)
    show_scores(scores, f"{model_dir} on {options.split}")
    if options.output_file:
        report = {"model": model_dir, "split": options.split, "scores": scores, "mean": average_score(scores)}
        write_json(Path(options.output_file), report)
    return scores


def _data_seed_of_run(model_dir: str) -> int:
    """The seed that divided the data of the run in ``model_dir`` (or of the run whose checkpoint it is); 0 without one.

    With another seed, split_validation_test would call items test that the run has seen as validation.
    """
    from mpoe.training.output_dir import RUN_FILE

    for folder in (Path(model_dir), Path(model_dir).resolve().parent):
        if (folder / RUN_FILE).is_file():
            training = json.loads((folder / RUN_FILE).read_text())["config"]["training"]
            seed = training.get("data_seed")
            return int(training.get("seed", 0) if seed is None else seed)
    return 0


def _model_dir(given: str | None, load_experiment: str | None) -> str:
    if (given is None) == (load_experiment is None):
        raise CommandError("evaluate needs a model first: mpoe evaluate MODEL_DIR, or --load_experiment RUN_DIR")
    if given is not None:
        return given
    from mpoe.cli.experiment import model_of_experiment

    return model_of_experiment(str(load_experiment))
