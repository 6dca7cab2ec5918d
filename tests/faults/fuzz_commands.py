"""Command lines that work, with one to three options changed, run in this process.

They end where a model would be loaded or measured. The options are those that the commands declare.
"""

import contextlib
import functools
import importlib
import inspect
import io
import itertools
from functools import partial
from unittest import mock

from mpoe.cli.command import make_parser
from mpoe.cli.main import main

from .fuzz import TABLES, Case, Refused, some

# Options of the Trainer that change the process, reach beyond it, or only name things.
LEFT_OUT = """hub deepspeed ddp_ local_rank log_level torch_compile run_name logging_dir trackio
full_determinism tf32 liger""".split()
# Values of some options, of none, or of another one.
VALUES = """-1 0 1 2 3 8 1000000000000 -0.5 0.1 1.0 nan inf 1e309 true false
None x é☃ { [] null {"a":"b"} a,b -- -x , .. /dev/null /proc/version here/data here/out plan.json
cpu eager t5 gpt2 doc_lm doc_lm,doc_module sentence label accuracy,f1 train validation test
switch moe none dense separable paper light random threshold identity sgd 0,1
ffn attention,embedding word_embed,mlp nompo decoder {".*wo":4} {"0":"bad","1":"good"}""".split()
VALUES += ["", "the film", '{"up": 1}', "[" * 3000, "9" * 5000]
COMMANDS = "train evaluate convert plan inspect generate demo bench info".split()


@functools.cache
def parser_of(command):
    """The parser of a command's options."""
    declared = importlib.import_module(
        f"mpoe.cli.{command}"
    ).command  # by `as_command`, with its groups of options
    return make_parser(inspect.getclosurevars(declared).nonlocals["groups"])


def options_of(command):
    """The parser's actions for every option of a command."""
    return [
        a
        for a in parser_of(command)._actions
        if a.option_strings and not any(part in a.dest for part in LEFT_OUT)
    ]


def words_of(option):
    """Values of its kind."""
    kind = getattr(option.type, "__name__", "") + repr(option.type)
    by_kind = {"bool": ("true", "false"), "int": ("1", "2", "3"), "float": ("0.1", "1.0")}
    found = next((by_kind[name] for name in by_kind if name in kind), VALUES)
    if isinstance(option.default, str):
        found = (option.default,)
    return [str(getattr(choice, "value", choice)) for choice in option.choices or found]


# Where work begins that an input cannot change any more.
WORK = """mpoe.cli.models.load_model mpoe.cli.plan.costs mpoe.training.MPOETrainer.train
mpoe.cli.demo.train_experts mpoe.cli.demo.compare_arms mpoe.cli.bench._measure
mpoe_kernels.info.collect""".split()


class Accepted(BaseException):
    """The command line was taken and work would begin."""


def cases(draw, folder):
    """An endless stream; what commands write stays below ``folder``."""
    inside = prepare(folder)
    for number in itertools.count():
        command = draw.choice(COMMANDS)
        tokens, names = (
            [command, *start_of(command, number)],
            ["model", "configuration file", "here/data"],
        )
        if draw.random() < 0.05:  # for train this is a configuration file
            tokens[1:2] = [draw.choice(VALUES)]
            names.append(tokens[1][:2])
        for option in some(draw, options_of(command), 3):
            flag, word = draw.choice(option.option_strings), draw.choice(words_of(option))
            if draw.random() < 0.2:
                word = draw.choice(VALUES)
            own = (
                [flag]
                if option.nargs == 0
                else draw.choice(([flag, word], [flag, word], [f"{flag}={word}"]))
            )
            if draw.random() < 0.1:
                own = draw.choice(([flag[:-1], word], [flag]))
            tokens += own
            marked = (option.dest.replace("_", mark) for mark in "_- ")
            names += [*marked, *own, repr(own[-1].rpartition("=")[2].strip(","))]
        yield Case(f"mpoe {' '.join(tokens)!r:.400}", partial(run, tokens, inside), names)


def prepare(folder):
    """A folder for commands to run in, with data, a model and a file of prompts."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from mpoe import MPOEConfig, convert_to_mpoe
    from mpoe.data.stand_in_models import stand_in_path

    inside = folder / "here/below"  # what relative paths write stays in ``folder``
    data = inside / "here/data"
    data.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (data / f"{split}.jsonl").write_text(TABLES[".jsonl"])
    dense = AutoModelForSeq2SeqLM.from_pretrained(stand_in_path("t5"))
    convert_to_mpoe(dense, MPOEConfig(num_experts=2, shape="separable")).save_pretrained(
        inside / "mixture"
    )
    AutoTokenizer.from_pretrained(stand_in_path("t5")).save_pretrained(inside / "mixture")
    return inside


def start_of(command, number):
    """Arguments with which the command works."""
    data, out = "--data_dir here/data", f"out{number}"
    few = "--max_steps 2 --use_cpu --report_to none"
    return {
        "train": f"--model t5 {data} --output_dir {out} {few}",
        "evaluate": f"mixture {data}",
        "convert": f"t5 {out}",
        "plan": "t5",
        "inspect": f"mixture {data} --output_dir {out}",
        "generate": "mixture --prompt x --max_new_tokens 2",
        "demo": f"--output_dir {out}",
        "bench": f"--out {out}",
        "info": "",
    }[command].split()


def run(tokens, inside):
    """Run a command line: exit code 0 or taken is well, 2 a refusal; a defect (1) raises with its
    traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        for gate in WORK:
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
