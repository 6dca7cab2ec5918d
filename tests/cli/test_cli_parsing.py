"""Configuration files and flags: precedence, kinds of values, and what is refused."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mpoe.cli.errors import CommandError
from mpoe.cli.parsing import Asked, as_command, make_parser, option, option_names, parse
from mpoe.cli.train import GROUPS


@dataclass
class First:
    rate: float = 1e-3
    steps: int = 10
    limit: int | None = 7
    tasks: list[str] = field(default_factory=list)
    fast: bool = False
    careful: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")


@dataclass
class Second:
    long_name: str = field(default="x", metadata={"aliases": ["--other_name"]})


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "rate: 5e-5\nsteps: 3\nlong_name: from file\n")
    (first, second), given, _, _ = parse([First, Second], ["--steps", "4"], file)
    assert (first.rate, first.steps, second.long_name) == (5e-5, 4, "from file")
    assert given == {"rate", "steps", "long_name"}


def test_dashes_and_underscores_and_aliases_name_the_same_option() -> None:
    for flags in (["--long_name", "a"], ["--long-name=a"], ["--other_name", "a"]):
        (second,), given, _, _ = parse([Second], flags)
        assert second.long_name == "a"
        assert given == {"long_name"}


def test_lists_booleans_and_null_from_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, "c.json", '{"tasks": ["a", "b"], "fast": true, "careful": false, "limit": null}')
    (first,), *_ = parse([First], [], file)
    assert (first.tasks, first.fast, first.careful, first.limit) == (["a", "b"], True, False, 7)
    (first,), *_ = parse([First], ["--tasks", "c", "--limit", "2", "--careful"], file)
    assert (first.tasks, first.limit, first.careful) == (["c"], 2, True)


def test_unknown_flag_is_refused_with_close_matches() -> None:
    with pytest.raises(CommandError, match=r"unknown option '--stepz'; did you mean '--steps'"):
        parse([First], ["--stepz", "3"])


def test_help_of_train_shows_what_matters_first(cli, refused) -> None:
    short, full = cli("train", "--help").out, cli("train", "--help", "all").out
    lines = short.splitlines()
    assert len(lines) < 40
    assert max(map(len, lines)) <= 110
    names = [line.split()[0] for line in lines if line.startswith("  --")]
    known = option_names(make_parser(GROUPS))
    assert {name.removeprefix("--") for name in names} <= set(known)
    assert "mpoe train --help all" in short
    assert all(f"--{name}" in full for name in ("linear_trunc", "temperature", "gauge", "load_experiment"))
    assert "did you mean '--per_device_train_batch_size'?" in refused("train", "--batch_size", "4")


def test_prefixes_are_not_taken_for_the_option() -> None:
    with pytest.raises(CommandError, match="unknown option '--step'"):
        parse([First], ["--step", "3"])


def test_unknown_key_is_refused_naming_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "lon_name: a\n")
    with pytest.raises(CommandError, match=r"c\.yaml: unknown option 'lon_name'; did you mean 'long_name'"):
        parse([First, Second], [], file)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"steps": 3,\n "rate": }', r"c\.json, line 2, column 10: bad JSON"),
        ("c.yaml", "steps: 3\nrate: [1, 2\nfast: true\n", r"c\.yaml, line 3, column 5: bad YAML"),
        ("c.yaml", "- a\n- b\n", "expected a mapping of names to values; got list"),
        ("c.json", f'{{"rate": {"9" * 5000}}}', r"c\.json: bad JSON: Exceeds the limit"),
        ("c.yaml", "rate: 2001-99-99\n", r"c\.yaml: bad YAML: month must be in 1\.\.12"),
        ("c.toml", "", r"must be a \.json, \.yaml or \.yml file"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(CommandError, match=message):
        parse([First], [], write(tmp_path, name, text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="configuration file not found"):
        parse([First], [], tmp_path / "absent.yaml")


def test_wrong_kind_of_value_names_where_it_came_from(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "steps: many\n")
    with pytest.raises(CommandError, match=r"c\.yaml: argument --steps: invalid int value: 'many'"):
        parse([First], [], file)
    with pytest.raises(CommandError, match=r"^argument --steps: invalid int value: 'few'"):
        parse([First], ["--steps", "few"])


def test_what_a_dataclass_refuses_and_stray_values() -> None:
    with pytest.raises(CommandError, match="steps must be at least 1; got 0"):
        parse([First], ["--steps", "0"])
    with pytest.raises(CommandError, match=r"^values without an option: 'stray' ''$"):
        parse([First], ["stray", ""])
    for flag in option_names(make_parser([First])):
        with pytest.raises(CommandError, match=rf"^--{flag} must have a value; got '--'$"):
            parse([First], [f"--{flag}=--"])


def test_lists_of_a_file_that_are_none(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "tasks: []\n")
    with pytest.raises(CommandError, match=r"c\.yaml: option 'tasks' needs at least one value; got an empty list"):
        parse([First, Second], [], file)
    file = write(tmp_path, "c.yaml", "tasks: [a, -x]\n")
    with pytest.raises(CommandError, match=r"c\.yaml: values without an option: '-x'"):
        parse([First, Second], [], file)


def test_empty_values_of_a_file_are_not_given(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "rate:\nsteps:\ntasks:\nfast:\nlong_name:\nlimit:\n")
    assert parse([First, Second], [], file).options == (First(), Second())
    (first,), given, *_ = parse([First], ["--steps", "4"], write(tmp_path, "d.yaml", "steps:\nrate:\n"))
    assert (first.steps, given) == (4, {"steps"})


@dataclass
class Third:
    """What a command is asked for."""

    prompt: list[str] = option([], "may be repeated", action="append")
    fast: bool = option(False, "hurry")
    items: list[int] = option([], "numbers")
    rate: float = option(0.5, "of learning", "learning_rate")


@as_command("mpoe x MODEL", Third, words=(1, 1))
def read(asked: Asked) -> Asked:
    """Return what was asked."""
    return asked


@as_command("mpoe y", Third, config=True)
def read_file(asked: Asked) -> Asked:
    """Return what was asked."""
    return asked


@pytest.mark.parametrize(
    "tokens",
    [
        ("m", "--prompt", "a", "--fast", "--prompt", "b"),
        ("--prompt", "a", "m", "--prompt", "b", "--fast"),
        ("--fast", "m", "--prompt", "a", "--prompt=b"),
        ("--prompt", "a", "--prompt", "b", "--fast", "true", "m"),
    ],
)
def test_a_model_may_stand_anywhere(tokens: tuple[str, ...]) -> None:
    asked = read(tokens)
    assert asked is not None
    assert asked.typed == shlex.join(["mpoe", "x", *tokens])
    assert asked.words == ["m"]
    assert asked.options == (Third(["a", "b"], True),)
    assert asked.given == {"prompt", "fast"}


def test_lists_take_what_follows_and_surplus_words_are_refused() -> None:
    asked = read(["m", "--items", "1", "2", "--learning-rate", "1e-3"])
    assert asked is not None
    assert asked.options == (Third(items=[1, 2], rate=1e-3),)
    with pytest.raises(CommandError, match=r"^x needs a model first: mpoe x MODEL \(see mpoe x --help\)$"):
        read(["--items", "3"])
    for tokens in (("m", "n"), ("--fast", "m", "n"), ("m", "--rate", "1", "n")):
        with pytest.raises(CommandError, match="values without an option: 'n'"):
            read(tokens)
    with pytest.raises(CommandError, match="argument --prompt: expected one argument"):
        read(["m", "--prompt"])


def test_a_configuration_file_comes_first(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "rate: 0.25\nprompt: a\n")
    asked = read_file([str(file), "--fast"])
    assert asked is not None
    assert asked.options == (Third(["a"], True, rate=0.25),)
    assert asked.given == {"prompt", "fast", "rate"}
    with pytest.raises(CommandError, match="argument --fast: Truthy value expected: got maybe"):
        read_file(["--fast", "maybe"])


def test_help_is_printed_wherever_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    for tokens in (["-h"], ["m", "--fast", "--help"], []):
        assert read(tokens) is None
        out = capsys.readouterr().out
        assert "mpoe x MODEL" in out
        assert "Configuration files and flags" in out  # the module's docstring
        assert "--rate, --learning_rate" in out
        assert "hurry" in out
    anything = as_command("mpoe z", Third)(lambda asked: asked)  # a command that takes no words runs
    assert anything([]) == Asked((Third(),), set(), [])
