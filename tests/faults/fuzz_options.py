"""The options of every command, as the commands declare them, and values that are right, nearly right or nonsense."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mpoe.cli.bench import BenchOptions
from mpoe.cli.convert import ConvertOptions
from mpoe.cli.demo import DemoOptions
from mpoe.cli.evaluate import EvaluateOptions
from mpoe.cli.generate import GenerateOptions
from mpoe.cli.info import InfoOptions
from mpoe.cli.inspect import InspectOptions
from mpoe.cli.options import ExpertOptions, RunOptions
from mpoe.cli.parsing import make_parser
from mpoe.cli.plan import PlanOptions
from mpoe.cli.tasks import DataOptions
from mpoe.training import MPOETrainingArguments

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
    "suite": ("quick", "full", "planner", "targets", "gpu"),
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
