"""Configuration files and flags: precedence, kinds of values, refusals; help and `mpoe info`."""

import json
import logging
import re
import shlex
from dataclasses import dataclass, field

import pytest

from mpoe.cli.command import Request, as_command, make_parser, option, option_names, parse
from mpoe.cli.errors import CommandError, is_on_purpose
from mpoe.cli.short_help import COMMANDS
from mpoe.cli.train import GROUPS
from mpoe_kernels import backend_reasons
from mpoe_kernels.version import __version__
from tests.assertions import refuses, run_python


@dataclass
class First:
    rate: float = 1e-3
    steps: int = 10
    limit: int | None = 7
    tasks: list[str] = field(default_factory=list)
    fast: bool = False
    careful: bool = True

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")


@dataclass
class Second:
    long_name: str = field(default="x", metadata={"aliases": ["--other_name"]})


def write(folder, name, text):
    file = folder / name
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    "module, line, expected",
    [
        ("mpoe.data", "raise ValueError('wrong')", True),
        ("mpoe.layers", "raise NotImplementedError", False),
        ("mpoe_kernels", "raise ValueError('wrong')", True),
        ("mpoe_other", "raise ValueError('wrong')", False),
        ("mpoe.data", "float('wrong')", False),
        ("mpoe_kernels.routing", "float('wrong')", True),  # as of the compiled library
    ],
)
def test_errors_that_this_package_raises_are_meant_for_the_user(module, line, expected):
    with pytest.raises((ValueError, NotImplementedError)) as caught:
        exec(line, {"__name__": module})
    assert is_on_purpose(caught.value) == expected


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = write(tmp_path, "c.yaml", "rate: 5e-5\nsteps: 3\nlong_name: from file\n")
    (first, second), given, *_ = parse([First, Second], ["--steps", "4"], file)
    assert (first.rate, first.steps, second.long_name) == (5e-5, 4, "from file")
    assert given == {"rate", "steps", "long_name"}


def test_dashes_and_underscores_and_aliases_name_the_same_option():
    for flags in (["--long_name", "a"], ["--long-name=a"], ["--other_name", "a"]):
        (second,), given, *_ = parse([Second], flags)
        assert (second.long_name, given) == ("a", {"long_name"})


def test_lists_and_booleans_from_a_file_and_what_is_empty_there(tmp_path):
    file = write(
        tmp_path, "c.json", '{"tasks": ["a", "b"], "fast": true, "careful": false, "limit": null}'
    )
    (first,), *_ = parse([First], [], file)
    assert (first.tasks, first.fast, first.careful, first.limit) == (["a", "b"], True, False, 7)
    (first,), *_ = parse([First], ["--tasks", "c", "--limit", "2", "--careful"], file)
    assert (first.tasks, first.limit, first.careful) == (["c"], 2, True)
    file = write(tmp_path, "c.yaml", "rate:\nsteps:\ntasks:\nfast:\nlong_name:\nlimit:\n")
    assert parse([First, Second], ["--steps", "4"], file)[:2] == (
        (First(steps=4), Second()),
        {"steps"},
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_short_help_names_options_that_are_there(name, cli):
    whole = cli(name, "--help", "all").out
    options = set(re.findall(r"(?:--|, |^)(\w+)", whole, re.MULTILINE))  # the Trainer's in lists
    assert set(COMMANDS[name].options) <= options


def test_help_of_train_shows_what_matters_first(cli, refused):
    short, full = cli("train", "--help").out, cli("train", "--help", "all").out
    lines = short.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 110
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {name.removeprefix("--") for name in names} <= set(option_names(make_parser(GROUPS)))
    assert "mpoe train --help all" in short
    assert all(
        f"--{name}" in full for name in ("linear_trunc", "temperature", "gauge", "load_experiment")
    )
    assert "warmup_steps" in full  # of the Trainer's own, the names
    assert "did you mean '--per_device_train_batch_size'?" in refused("train", "--batch_size", "4")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--stepz", "3"], r"^unknown option '--stepz'; did you mean '--steps'"),
        (["--step", "3"], "unknown option '--step'"),  # a prefix is not taken for the option
        (["--steps", "few"], r"^argument --steps: invalid int value: 'few'"),
        (["--steps", "0"], "steps must be at least 1; got 0"),
        (["stray", ""], r"^values without an option: 'stray' ''$"),
        *(
            ([f"--{name}=--"], rf"^--{name} must have a value; got '--'$")
            for name in ("rate", "tasks", "fast")
        ),
    ],
)
def test_flags_that_are_refused(flags, message):
    refuses(CommandError, message, parse, [First], flags)


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "c.yaml",
            "lon_name: a\n",
            r"c\.yaml: unknown option '--lon_name'; did you mean '--long_name'",
        ),
        ("c.yaml", "steps: many\n", r"c\.yaml: argument --steps: invalid int value: 'many'"),
        ("c.yaml", "tasks: []\n", r"c\.yaml: argument --tasks: expected at least one argument"),
        ("c.yaml", "tasks: [a, -x]\n", r"c\.yaml: values without an option: '-x'"),
        ("c.yaml", "tasks: [a, --fast]\n", r"c\.yaml: tasks must not hold an option; got '--fast'"),
        ("c.json", '{"steps": 3,\n "rate": }', r"c\.json, line 2, column 10: bad JSON"),
        ("c.yaml", "steps: 3\nrate: [1, 2\nfast: true\n", r"c\.yaml, line 3, column 5: bad YAML"),
        ("c.yaml", "- a\n- b\n", "expected a mapping of names to values; got list"),
        ("c.json", f'{{"rate": {"9" * 5000}}}', r"c\.json: bad JSON: Exceeds the limit"),
        ("c.yaml", "rate: 2001-99-99\n", r"c\.yaml: bad YAML: month must be in 1\.\.12"),
        ("c.toml", "", r"must be a \.json, \.yaml or \.yml file"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, message):
    refuses(CommandError, message, parse, [First, Second], [], write(tmp_path, name, text))
    refuses(
        CommandError,
        "configuration file not found",
        parse,
        [First, Second],
        [],
        tmp_path / "absent.yaml",
    )


@dataclass
class Third:
    """What a command is asked for."""

    prompt: list[str] = option([], "may be repeated", action="append")
    fast: bool = option(False, "hurry")
    items: list[int] = option([], "numbers")
    rate: float = option(0.5, "of learning", "learning_rate")


@as_command(Third, words=(1, 1), usage="mpoe x MODEL")
def read(request: Request) -> Request:
    """Return what was asked."""
    return request


def test_words_may_follow_options_and_surplus_ones_are_refused():
    tokens = "m --prompt a --fast --prompt=b --items 1 2 --learning-rate 1e-3".split()
    typed = shlex.join(["mpoe", "x", *tokens])
    given = {"prompt", "fast", "items", "rate"}
    assert read(tokens) == Request((Third(["a", "b"], True, [1, 2], 1e-3),), given, ["m"], typed)
    for others in (("m", "n"), ("m", "--rate", "1", "n")):
        refuses(CommandError, "values without an option: 'n'", read, others)
    refuses(CommandError, "argument --prompt: expected one argument", read, ["m", "--prompt"])
    request = read(["--rate", "1", "m", "--fast"])
    assert (request.words, request.options) == (["m"], (Third(fast=True, rate=1.0),))
    assert (
        read(["--fast", "m"])[:3]
        == read(["m", "--fast"])[:3]
        == ((Third(fast=True),), {"fast"}, ["m"])
    )
    refuses(
        CommandError,
        r"^x needs a model first: mpoe x MODEL \(see mpoe x --help\)$",
        read,
        ["--items", "3"],
    )


def test_help_is_printed_wherever_it_is_asked_for(capsys):
    for tokens in (["-h"], ["m", "--fast", "--help"], []):
        assert read(tokens) is None
        out = capsys.readouterr().out
        for words in (
            "mpoe x MODEL",
            "Configuration files and flags",
            "--rate, --learning_rate",
            "hurry",
        ):
            assert words in out  # the second one is this module's docstring
    anything = as_command(Third, usage="mpoe z")(
        lambda request: request.options
    )  # a command that takes no words runs
    assert anything([]) == (Third(),)


def test_help_needs_no_torch():
    code = (
        "import sys\nfrom mpoe.cli.main import main, run\nrun(['compose', '--help'])\n"
        "try:\n    main(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    said = run_python("-c", code)
    for words in ("--background", "mpoe compose --help all", *COMMANDS):
        assert words in said, words


def test_info_shows_versions_and_backends(cli):
    assert cli("--version").out == f"mpoe {__version__}\n"
    of_torchao = logging.makeLogRecord(
        {"msg": "%s is an Enum subclass and is now natively supported by"}
    )
    assert not logging.getLogger("torch.utils._pytree").filter(of_torchao)
    answer = cli("info")
    assert "eager" in answer.out
    assert "Usage" not in answer.out
    facts = json.loads(cli("info", "--json").out)
    assert facts["packages"]["torch"]
    assert facts["backends"] == backend_reasons()
    assert facts["cores"] >= 1


def test_the_package_runs_as_a_module():
    assert "frobnicate" in run_python("-m", "mpoe", "frobnicate", code=2)
