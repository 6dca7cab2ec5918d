"""Random command lines, run in this process up to where a model would be loaded or measured."""

from __future__ import annotations

import contextlib
import importlib
import io
import random
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from unittest import mock

from mpoe.cli.evaluate import EvaluateOptions
from mpoe.cli.experiment import ExperimentOptions
from mpoe.cli.inspect import InspectOptions
from mpoe.cli.main import main
from mpoe.cli.options import ExpertOptions, ModelOptions
from mpoe.cli.plan import PlanOptions
from mpoe.cli.tasks import DataOptions
from mpoe.cli.train import RunOptions

from .fuzz import Case, Refused, some
from .fuzz_data import TABLES

VALUES = (
    *(
        "",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "64",
        "1000000000000",
        "0.5",
        "-0.5",
        "nan",
        "inf",
        "1e309",
        "true",
        "false",
        "None",
    ),
    *(
        "x",
        "é☃",
        "{",
        "[]",
        "null",
        '{"up": 1}',
        '{"a": "b"}',
        "[" * 3000,
        "9" * 5000,
        "a,b",
        ",",
        "..",
        "/",
        "/dev/null",
    ),
    *(
        "t5",
        "gpt2",
        "switch",
        "moe",
        "none",
        "mpo",
        "dense",
        "paper",
        "light",
        "separable",
        "train",
        "test",
        "ffn",
        "mlp",
    ),
    *(
        "/proc/version",
        "doc_module",
        "label",
        "sentence",
        "accuracy",
        "regression",
        "orthogonal",
        "eager",
        "bf16",
        "h100",
    ),
)
TRAINER = (
    *("max_steps", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "save_steps", "eval_steps"),
    *("logging_steps", "seed", "data_seed", "warmup_steps", "gradient_accumulation_steps", "weight_decay", "bf16"),
    *("gradient_mask_prob", "regime", "mpo_lr", "train_AT_index", "update_mpo_layer", "optim", "lr_scheduler_type"),
    *("label_smoothing_factor", "save_total_limit", "eval_strategy", "save_strategy", "max_grad_norm", "report_to"),
)
MODEL_GROUPS = (ModelOptions, ExpertOptions)
OPTIONS = {
    "train": [
        *TRAINER,
        *(f.name for g in (RunOptions, ExperimentOptions, DataOptions, *MODEL_GROUPS) for f in fields(g)),
    ],
    "evaluate": [f.name for group in (EvaluateOptions, DataOptions) for f in fields(group)],
    "convert": ["overwrite", "original_checkpoint", *(f.name for f in fields(ExpertOptions))],
    "plan": [f.name for group in (PlanOptions, ExpertOptions) for f in fields(group)],
    "inspect": [f.name for group in (InspectOptions, DataOptions) for f in fields(group)],
    "generate": ["prompt", "file", "max_new_tokens", "num_beams", "do_sample", "temperature", "seed"],
    "demo": ["model", "steps", "seed", "overwrite", "output_dir"],
    "bench": ["suite", "device", "backend", "out", "threads", "clock", "scale", "wide", "minutes"],
}
# Where work begins that an input cannot change any more.
GATES = ("mpoe.cli.pretrained.load_model", "mpoe.cli.demo.run", "mpoe.cli.bench._measure")


class Accepted(BaseException):
    """The command line was taken and work would begin."""


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """An endless stream; what commands write stays below ``folder``."""
    data = folder / "data"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(TABLES[".jsonl"])
    inside = folder / "here" / "below"  # what relative paths write stays in ``folder``
    inside.mkdir(parents=True)
    while True:
        command = draw.choice(sorted(OPTIONS))
        tokens = [command, *start_of(command, folder, draw)]
        for name in some(draw, OPTIONS[command], 2):
            name = name if draw.random() < 0.9 else name[:-1]
            tokens += draw.choice(
                ([f"--{name}"], [f"--{name}={value_of(draw)}"], *3 * ([f"--{name}", value_of(draw)],))
            )
        yield Case(f"mpoe {' '.join(tokens)!r:.400}", partial(run, tokens, inside))


def value_of(draw: random.Random) -> str:
    return draw.choice(VALUES)


def start_of(command: str, folder: Path, draw: random.Random) -> list[str]:
    """Arguments with which the command would work, most of the time."""
    if draw.random() < 0.1:
        return [value_of(draw)]
    data = ["--data_dir", str(folder / "data")]
    return {
        "train": ["--model", "t5", *data, "--output_dir", str(folder / "run"), "--max_steps", "2", "--use_cpu"],
        "evaluate": ["t5", *data],
        "convert": ["t5", str(folder / "out")],
        "plan": ["t5"],
        "inspect": ["t5", *data, "--output_dir", str(folder / "report")],
        "generate": ["t5", "--prompt", "x"],
        "demo": ["--output_dir", str(folder / "demo")],
        "bench": ["--out", str(folder / "bench")],
    }[command]


def run(tokens: list[str], inside: Path) -> None:
    """Run a command line: exit code 0 or taken is well, 2 a refusal; a defect (1) raises with its traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for gate in GATES:
            importlib.import_module(gate.rpartition(".")[0])
            stack.enter_context(mock.patch(gate, side_effect=Accepted))
        stack.enter_context(contextlib.chdir(inside))
        stack.enter_context(mock.patch.dict("os.environ", HF_HUB_OFFLINE="1"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main(tokens)
        except Accepted:
            return
        except SystemExit as end:
            code = int(str(end.code or 0))
            if code == 2 and "Traceback" not in err.getvalue() and err.getvalue().strip():
                raise Refused(err.getvalue()) from None
            if code != 0:
                raise AssertionError(f"exit code {code}: {err.getvalue()[-1500:]}") from None
