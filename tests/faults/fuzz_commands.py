"""Command lines that work, with one to three options changed, run in this process.

Most end where a model would be loaded or measured; a share of those whose values all fit is run on. The options are
those that the commands declare.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import itertools
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from mpoe.cli.bench import BenchOptions
from mpoe.cli.command import make_parser
from mpoe.cli.convert import ConvertOptions
from mpoe.cli.demo import DemoOptions
from mpoe.cli.evaluate import EvaluateOptions
from mpoe.cli.generate import GenerateOptions
from mpoe.cli.info import InfoOptions
from mpoe.cli.inspect import InspectOptions
from mpoe.cli.main import main
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.plan import PlanOptions
from mpoe.cli.tasks import DataOptions
from mpoe.training import MPOETrainingArguments

from .fuzz import TABLES, Case, Refused, some

GROUPS: dict[str, tuple[type, ...]] = {
    "train": (RunOptions, DataOptions, ExpertOptions, MPOETrainingArguments),
    "evaluate": (EvaluateOptions, DataOptions),
    "convert": (ConvertOptions, ExpertOptions),
    "plan": (PlanOptions, ExpertOptions),
    "inspect": (InspectOptions, DataOptions),
    "generate": (GenerateOptions,),
    "demo": (DemoOptions,),
    "bench": (BenchOptions,),
    "info": (InfoOptions,),
}
# Options of the Trainer that change the process, reach beyond it, or only name things.
LEFT_OUT = (
    "hub",
    "deepspeed",
    "ddp_",
    "local_rank",
    "log_level",
    "torch_compile",
    "run_name",
    "logging_dir",
    "trackio",
)
LEFT_OUT += ("full_determinism", "tf32", "liger")
WORDS: dict[str, tuple[str, ...]] = {
    "model": ("t5", "gpt2"),
    "moe_type": ("switch", "moe", "none"),
    "expert_type": ("mpo", "dense"),
    "shape": ("separable", "paper", "light", '{"up": {"in_factors": [4, 16], "out_factors": [8, 16]}}'),
    "shape_pattern": ('{".*wo": 4}', '{"wo": "paper", "wi": 3}', "{}"),
    "gauge": ("symmetric", "orthogonal", "identity"),
    "target_modules": ("ffn", "attention", "embedding"),
    "mpo_layers": ("mlp", "word_embed", "attention", "nompo"),
    "exclude_modules": ("encoder.block.0", "decoder", "transformer.h.0"),
    "backend": ("eager", "auto"),
    "second_policy": ("random", "all", "none", "threshold"),
    "eval_second_policy": ("random", "all", "none", "threshold"),
    "train_AT_index": ("0", "0,1", "2"),
    "regime": ("finetune", "pretrain"),
    "tasks": ("here/data", "doc_lm", "doc_module"),
    "eval_tasks": ("here/data", "doc_lm"),
    "kind": ("classification", "generation"),
    "text_columns": ("sentence",),
    "label_column": ("label",),
    "label_words": ('{"0": "bad", "1": "good"}',),
    "column_names": ("sentence", "label"),
    "metrics": ("accuracy", "f1"),
    "split": ("train", "validation", "test"),
    "device": ("cpu",),
    "dtype": ("fp32", "bf16", "fp16"),
    "max_parameters": ("300M", "1.2B", "50_000_000"),
    "json": ("plan.json",),
    "output_file": ("scores.json",),
    "output_dir": ("out", "here/out"),
    "out": ("out",),
    "suite": ("quick", "planner", "targets", "gpu"),
    "clock": ("wall", "cpu"),
    "scale": ("real", "tiny"),
    "prompt": ("the film", "x"),
    "text": ("the film", "x"),
    "optim": ("adamw_torch", "adafactor", "sgd"),
    "report_to": ("none", "tensorboard"),
}
# Values of no option, or of another one.
NONSENSE = (
    *("", "-1", "0", "1000000000000", "-0.5", "nan", "inf", "1e309", "true", "None", "x", "é☃", "{", "[]", "null"),
    *('{"up": 1}', '{"a": "b"}', "[" * 3000, "9" * 5000, "a,b", ",", "..", "/dev/null", "/proc/version", "--", "-x"),
    *("t5", "switch", "paper", "train", "label", "accuracy", "eager"),
)


@dataclass(frozen=True)
class Option:
    """One option: ``kind`` is bool, int, float or text; ``words`` are values that fit."""

    name: str
    kind: str
    words: tuple[str, ...]


@functools.cache
def options_of(command: str) -> dict[str, Option]:
    """Every option of a command by name."""
    actions = make_parser(GROUPS[command])._actions
    actions = [a for a in actions if a.nargs != 0]  # without the negations of flags
    found = [Option(a.dest, _kind(a.type), _words(a.dest, _kind(a.type), a.default, a.choices)) for a in actions]
    return {each.name: each for each in found if not any(part in each.name for part in LEFT_OUT)}


def _kind(declared: Any) -> str:
    """Of a parser's type."""
    text = getattr(declared, "__name__", "") + repr(declared)
    return next((kind for kind in ("bool", "int", "float") if kind in text), "text")


def _words(name: str, kind: str, default: Any, choices: Iterable[Any] | None = None) -> tuple[str, ...]:
    """Values that fit: known ones, the choices, or numbers around the default."""
    if name in WORDS:
        return WORDS[name]
    if choices:
        return tuple(str(getattr(choice, "value", choice)) for choice in choices)
    number = default if isinstance(default, (int, float)) and not isinstance(default, bool) else None
    return {
        "bool": ("true", "false"),
        "int": tuple(map(str, (1, 2, 3, *([] if number is None else [int(number), int(number) + 1])))),
        "float": tuple(map(str, (0.1, 1.0, *([] if number is None else [number, number / 2])))),
        "text": ("x",),
    }[kind]


def nearly(word: str, draw: random.Random) -> str:
    """A value that is almost this one."""
    try:
        number = float(word)
    except ValueError:
        at = draw.randrange(len(word) + 1)
        return draw.choice((word[:at] + word[at + 1 :], word[:at] + word[at : at + 1] * 2, word.upper(), f"{word},"))
    return draw.choice((str(-number), "0", word + "000", f"{number + 0.5}", f"{word}x", f" {word}", f"{number:g}"))


COMMANDS = ("train", "evaluate", "convert", "plan", "inspect", "generate", "demo", "bench", "info")
WEIGHTS = (6, 3, 4, 4, 3, 2, 1, 2, 0.5)
# Where work begins that an input cannot change any more, and where it begins to take long.
WORK = ("mpoe.cli.models.load_model", "mpoe.cli.plan.costs")
LONG_WORK = (
    "mpoe.training.MPOETrainer.train",
    "mpoe.cli.demo.train_experts",
    "mpoe.cli.demo.compare_arms",
    "mpoe.cli.bench._measure",
    "mpoe_kernels.info.collect",
)
RUN_ON = 0.3  # of the command lines whose values all fit


class Accepted(BaseException):
    """The command line was taken and work would begin."""


def cases(draw: random.Random, folder: Path) -> Iterator[Case]:
    """An endless stream; what commands write stays below ``folder``."""
    inside = prepare(folder)
    for number in itertools.count():
        command = draw.choices(COMMANDS, WEIGHTS)[0]
        tokens, names, fit = [command, *start_of(command, number)], ["model", "configuration file"], True
        if draw.random() < 0.05:  # for train this is a configuration file
            tokens[1:2], fit = [draw.choice(NONSENSE)], False
            names.append(tokens[1][:2])
        for option in some(draw, options_of(command).values(), 3):
            own, fits = changed(option, draw)
            tokens, fit = [*tokens, *own], fit and fits
            names += [
                *(option.name.replace("_", mark) for mark in "_- "),
                *own,
                repr(own[-1].rpartition("=")[2].strip(",")),
            ]
        run_on = fit and draw.random() < RUN_ON
        yield Case(f"mpoe {' '.join(tokens)!r:.400}", partial(run, tokens, inside, run_on), names)


def changed(option: Option, draw: random.Random) -> tuple[list[str], bool]:
    """Tokens that set an option, and whether their value fits."""
    flag, word, roll = f"--{option.name}", draw.choice(option.words), draw.random()
    if roll < 0.6:
        return ([flag] if option.kind == "bool" else [flag, word]), True
    if roll < 0.8:
        return [flag, nearly(word, draw)], False
    if roll < 0.9:
        return [f"{flag}={draw.choice(NONSENSE)}"], False
    return draw.choice(([flag[:-1], word], [flag], [flag.replace("_", "-"), word], [f"{flag}={word}", flag])), False


def prepare(folder: Path) -> Path:
    """A folder for commands to run in, with data, a model and a file of prompts."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from mpoe import MPOEConfig, convert_to_mpoe
    from mpoe.data.embedded import stand_in_path

    inside = folder / "here" / "below"  # what relative paths write stays in ``folder``
    data = inside / "here" / "data"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(TABLES[".jsonl"])
    dense = AutoModelForSeq2SeqLM.from_pretrained(stand_in_path("t5"))
    convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable")).save_pretrained(inside / "mixture")
    AutoTokenizer.from_pretrained(stand_in_path("t5")).save_pretrained(inside / "mixture")
    return inside


def start_of(command: str, number: int) -> list[str]:
    """Arguments with which the command works."""
    data, out = ["--data_dir", "here/data"], f"out{number}"
    return {
        "train": ["--model", "t5", *data, "--output_dir", out, "--max_steps", "2", "--use_cpu", "--report_to", "none"],
        "evaluate": ["mixture", *data],
        "convert": ["t5", out],
        "plan": ["t5"],
        "inspect": ["mixture", *data, "--output_dir", out],
        "generate": ["mixture", "--prompt", "x", "--max_new_tokens", "2"],
        "demo": ["--output_dir", out],
        "bench": ["--out", out],
        "info": [],
    }[command]


def run(tokens: Sequence[str], inside: Path, run_on: bool = False) -> None:
    """Run a command line: exit code 0 or taken is well, 2 a refusal; a defect (1) raises with its traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for gate in (*LONG_WORK, *([] if run_on else WORK)):
            importlib.import_module(gate.rpartition(".")[0].removesuffix(".MPOETrainer"))
            stack.enter_context(mock.patch(gate, side_effect=Accepted))
        stack.enter_context(contextlib.chdir(inside))
        stack.enter_context(mock.patch.dict("os.environ", HF_HUB_OFFLINE="1"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main(list(tokens))
        except Accepted:
            return
        except SystemExit as end:
            code = int(str(end.code or 0))
            if code == 2 and "Traceback" not in err.getvalue() and err.getvalue().strip():
                raise Refused(err.getvalue()) from None
            if code != 0:
                raise AssertionError(f"exit code {code}: {err.getvalue()[-1500:]}") from None
