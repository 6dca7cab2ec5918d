"""Reads a configuration file and flags into dataclasses: flags override the file, unknown names are refused.

Options are spelled ``--like_this`` or ``--like-this``, as in all Hugging Face scripts; values from the file are
converted like flags, so ``5e-5`` means the same in both places.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import typing
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mpoe.cli.errors import CommandError, close_matches

# Exceptions that dataclasses of this package and of Transformers raise for invalid values.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, NotImplementedError)

_ROOM: dict[Any, float] = {None: 1, "?": 1, "+": math.inf}  # number of values of an option, by its nargs
# names that other tools have -> ours
_MEANT = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "data": "data_dir",
    "dataset": "data_dir",
    "output": "output_dir",
}
_TRUTHS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")  # those of HfArgumentParser


def option(default: Any, text: str, *aliases: str, **argparse_arguments: Any) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its value if it is not given; a list is copied.
        text: help text.
        aliases: other names, without dashes; each may be spelled with underscores or hyphens.
        argparse_arguments: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    spelled = [f"--{each}" for name in aliases for each in dict.fromkeys((name, name.replace("_", "-")))]
    metadata = {"help": text, **argparse_arguments, **({"aliases": spelled} if spelled else {})}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON or YAML mapping of option names to values; raises the errors of `read_mapping`."""
    from mpoe.data.mappings import read_mapping

    try:
        return read_mapping(path, "configuration file")
    except ValueError as error:
        raise CommandError(str(error)) from None


def make_parser(dataclass_types: Sequence[type]) -> argparse.ArgumentParser:
    """A parser with one option per dataclass field that raises `CommandError` instead of printing usage."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise CommandError(message)

    kinds: list[Any] = list(dataclass_types)
    parser = Parser(kinds, allow_abbrev=False, add_help=False)
    for action in parser._actions:
        if isinstance(action, argparse._AppendAction):
            action.nargs = None  # HfArgumentParser lets every list take several values; this one is repeated instead
    return parser


def _normal(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every option by its underscore name, without the dashes."""
    return {_normal(option): action for option, action in parser._option_string_actions.items()}


def _unknown(kind: str, name: str, known: Mapping[str, Any]) -> CommandError:
    dashes = "--" if name.startswith("--") else ""  # suggestions for a flag are written as flags
    meant = _MEANT.get(_normal(name))
    if meant in known:
        return CommandError(f"{kind} {name!r}; did you mean {dashes + str(meant)!r}?")
    return CommandError(f"{kind} {name!r}{close_matches(dashes + _normal(name), [dashes + k for k in known])}")


def _tokens(file: str, values: Mapping[str, Any], known: Mapping[str, argparse.Action]) -> tuple[list[str], list[str]]:
    """Command-line tokens for a file's values, and the destinations the file sets to null."""
    tokens: list[str] = []
    nulls: list[str] = []
    for key, value in values.items():
        name = _normal(key)
        if name not in known:
            raise _unknown(f"{file}: unknown option", key, known)
        action = known[name]
        if value is None:
            nulls.append(action.dest)
        elif isinstance(value, (list, tuple)) and action.nargs == "+":
            if not value:
                raise CommandError(f"{file}: option {key!r} needs at least one value; got an empty list")
            tokens += [f"--{name}", *(str(v) for v in value)]
        elif isinstance(value, (dict, list, tuple)):
            tokens.append(f"--{name}={json.dumps(value)}")
        else:
            tokens.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return tokens, nulls


def _nullable(dataclass_types: Sequence[type]) -> set[str]:
    """Fields that may be None; for other fields, an empty value in a file means that the field is not given."""
    names = set()
    for kind in dataclass_types:
        hints = typing.get_type_hints(kind)
        names |= {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is None or type(None) in typing.get_args(hints[f.name])
        }
    return names


def _check_flags(flags: Sequence[str], known: Mapping[str, argparse.Action]) -> None:
    for token in flags:
        if token.startswith("--") and len(token) > 2 and _normal(token.split("=", 1)[0]) not in known:
            raise _unknown("unknown option", token.split("=", 1)[0], known)
        if token.startswith("--") and token.partition("=")[2] == "--":  # argparse would drop it
            raise CommandError(f"{token[:-3]} must have a value; got '--'")


def parse(
    dataclass_types: Sequence[type],
    flags: Sequence[str],
    config: str | os.PathLike[str] | None = None,
    parser: argparse.ArgumentParser | None = None,
) -> tuple[tuple[Any, ...], set[str]]:
    """Fill ``dataclass_types`` from a configuration file and flags.

    Args:
        dataclass_types: dataclasses whose fields are the known options; field names must be unique.
        flags: command-line tokens; they override the file.
        config: JSON or YAML file, or None.
        parser: of `make_parser`, if it is there already.

    Returns:
        The instances, and the names of the fields that the file or the flags set.

    Raises:
        CommandError: unknown option (with similar names), a value of the wrong type (naming file or flag), or a value
            that a dataclass refuses.
    """
    if not flags and config is None:  # without Transformers, whose import takes a second
        return tuple(_build(kind, argparse.Namespace(), set()) for kind in dataclass_types), set()
    parser = parser or make_parser(dataclass_types)
    known = option_names(parser)
    _check_flags(flags, known)
    namespace, given = argparse.Namespace(), set()
    if config is not None:
        values = read_config(config)
        tokens, nulls = _tokens(str(config), values, known)
        nulls = [name for name in nulls if name in _nullable(dataclass_types)]
        given |= {known[_normal(key)].dest for key, value in values.items() if value is not None} | set(nulls)
        try:
            namespace, rest = parser.parse_known_args(tokens, namespace)
        except CommandError as error:
            raise CommandError(f"{config}: {error}") from None
        if rest:
            raise CommandError(f"{config}: {_stray(rest)}")
        for name in nulls:
            setattr(namespace, name, None)
    # argparse keeps values already in the namespace unless a flag sets them, so flags win
    namespace, rest = parser.parse_known_args(list(flags), namespace)
    if rest:
        raise _stray(rest)
    given |= {known[_normal(t.split("=", 1)[0])].dest for t in flags if t.startswith("--") and len(t) > 2}
    return tuple(_build(kind, namespace, given) for kind in dataclass_types), given


def _build(kind: type, namespace: argparse.Namespace, given: set[str]) -> Any:
    values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init and f.name in namespace}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return kind(**values)
    except _UNFIT as error:
        raise CommandError(_naming(str(error), {name: values[name] for name in given & values.keys()})) from error


def _naming(message: str, values: Mapping[str, Any]) -> str:
    """Transformers' errors may not name an option: find the one whose value they repeat, or else name all given
    ones."""
    if any(name in message for name in values):
        return message
    repeated = [name for name, value in values.items() if repr(value) in message]
    return f"{', '.join(sorted(repeated or values))}: {message}"


class Asked(NamedTuple):
    """A parsed command line: positional words, the filled dataclasses, the given options."""

    words: list[str]
    options: tuple[Any, ...]
    given: set[str]


def read_command(
    usage: str,
    about: str | None,
    groups: Sequence[type],
    arguments: Sequence[str],
    words: int = 0,
    config: bool = False,
    inherited: type | None = None,
    first: Mapping[str, str] | None = None,
) -> Asked | None:
    """Parse the tokens of a command; None if they ask for help, which is then printed.

    Args:
        first: the options that ``--help`` shows, with a few words about each; all others are shown by ``--help all``.
        usage, about, inherited: see `show_options`.
        groups: dataclasses whose fields are the options.
        arguments: the tokens.
        words: maximum number of positional words, such as the name of a model.
        config: the only positional word is a configuration file, which comes first.

    Raises:
        CommandError: see `parse`; also for too many words.
    """
    if any(token in ("-h", "--help") for token in arguments) or (words and not arguments):
        if first and "all" not in arguments:
            show_first(usage, about, first)
        else:
            show_options(usage, about, groups, inherited)
        return None
    if not arguments:
        return Asked([], *parse(groups, []))
    parser = make_parser(groups)
    start = 0 if arguments[0].startswith("--") else 1  # a file only in front: after a flag it would be its value
    found, flags = (
        (list(arguments[:start]), list(arguments[start:])) if config else _split(arguments, option_names(parser), words)
    )
    return Asked(found, *parse(groups, flags, found[0] if found and config else None, parser))


def _split(tokens: Sequence[str], known: Mapping[str, argparse.Action], most: int) -> tuple[list[str], list[str]]:
    """The positional words, at most ``most``, and all other tokens."""
    _check_flags(tokens, known)
    words: list[str] = []
    flags: list[str] = []
    action, room = None, 0.0  # the last option, and how many more values it may take
    for token in tokens:
        if token.startswith("--"):
            action = known.get(_normal(token.split("=", 1)[0]))
            room = _ROOM.get(action.nargs, 0) if action and "=" not in token else 0
        elif room and (action is None or action.nargs != "?" or token.lower() in _TRUTHS or len(words) == most):
            room -= 1
        else:
            words.append(token)
            room = 0
            continue
        flags.append(token)
    stray = [word for index, word in enumerate(words) if index >= most or word.startswith("-")]
    if stray:
        raise _stray(stray)
    return words, flags


def _stray(values: Sequence[str]) -> CommandError:
    return CommandError(f"values without an option: {' '.join(map(repr, values))}")


# ------------------------------------------------------------------- what --help prints


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return ""


def show_first(usage: str, about: str | None, options: Mapping[str, str]) -> None:
    """Print the few options that matter at first, one line each."""
    width = max(map(len, options)) + 2
    lines = [f"Usage: {usage}", "", *(about or "").strip().split("\n\n")[:1], ""]
    lines += [f"  --{name:{width}}{words}" for name, words in options.items()]
    command = " ".join(usage.split()[:2])
    print("\n".join([*lines, "", f"All others, with their defaults: {command} --help all"]))


def show_options(usage: str, about: str | None, groups: Sequence[type], inherited: type | None = None) -> None:
    """Print the options of a command.

    Args:
        usage: the usage line.
        about: what the command does; its first paragraph is shown.
        groups: dataclasses whose fields are the options.
        inherited: a base class whose fields (the Hugging Face Trainer's) are listed by name only.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(f"[bold]Usage:[/bold] {escape(usage)}\n")
    if about:
        console.print(escape(about.strip().split("\n\n")[0]) + "\n")
    console.print("Options are spelled --like_this or --like-this.\n")
    names_of_base = {f.name for f in dataclasses.fields(inherited)} if inherited else set()
    for group in groups:
        table = Table("option", "default", "meaning", title=getattr(group, "_argument_group_name", group.__name__))
        table.columns[0].no_wrap = True
        for field in dataclasses.fields(group):
            own = field.name not in names_of_base or "aliases" in field.metadata
            if field.init and own:
                aliases = [a for a in field.metadata.get("aliases", []) if "-" not in a[2:]]
                label = ", ".join([f"--{field.name}", *aliases])
                table.add_row(escape(label), escape(_default(field)), escape(str(field.metadata.get("help", ""))))
        console.print(table)
    if inherited:
        console.print(f"And every option of {inherited.__name__}: {', '.join(sorted(names_of_base))}", highlight=False)
