"""Command lines that work, with one to three options changed, run in this process.

Most end where a model would be loaded or measured; a share of those whose values all fit is run on.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from unittest import mock

from mpoe.cli.main import main

from .fuzz import Case, Refused, some
from .fuzz_data import TABLES
from .fuzz_options import NONSENSE, Option, nearly, options_of

COMMANDS = ("train", "evaluate", "convert", "plan", "inspect", "generate", "demo", "bench", "info")
WEIGHTS = (6, 3, 4, 4, 3, 2, 1, 2, 0.5)
# Where work begins that an input cannot change any more, and where it begins to take long.
WORK = ("mpoe.cli.pretrained.load_model", "mpoe.estimation.costs.model_costs")
LONG_WORK = (
    "mpoe.training.MPOETrainer.train",
    "mpoe.cli.demo.train_experts",
    "mpoe.cli.demo.compare_arms",
    "mpoe.cli.bench._measure",
    "mpoe.cli.info.collect",
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
