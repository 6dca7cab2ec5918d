"""What commands share: options as dataclasses, which `transformers.HfArgumentParser` fills from a
configuration file and flags.

Flags override the file, unknown names are refused. Options are spelled ``--like_this`` or
``--like-this``, as in all Hugging Face scripts; values from the file are converted like flags, so
``5e-5`` means the same in both places.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mpoe.cli.errors import CommandError, close_matches
from mpoe.cli.short_help import COMMANDS, show_short_help

HELP = {"-h", "--help"}
# the words that Transformers' parser takes for the value of a switch
_BOOLEANS = ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0")
# names that other tools have -> ours
_FOREIGN_NAMES = {
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "steps": "max_steps",
    "lr": "learning_rate",
    "data": "data_dir",
    "dataset": "data_dir",
    "output": "output_dir",
}
# Exceptions that dataclasses of this package and of Transformers raise for invalid values.
_CONSTRUCTION_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OSError,
    ImportError,
    NotImplementedError,
)


def comma_separated(values: Iterable[object]) -> list[str]:
    """The parts of an option that takes several values, with commas or apart."""
    parts = ",".join(map(str, values)).split(",")
    return [part.strip() for part in parts if part.strip()]


class Request(NamedTuple):
    """A parsed command line: the filled dataclasses, the names of the options that were set, the
    words that are no option's, and the whole as it was typed (empty without arguments)."""

    options: tuple
    given: set[str]
    words: Sequence[str] = ()
    typed: str = ""


def option(default: Any, text: str, *aliases: str, **argparse_arguments: Any) -> Any:
    """A dataclass field that is an option; the class may have ``LEAST``, pairs of the name and the
    smallest value of some.

    Args:
        default: its value if it is not given; a list is copied.
        text: help text.
        aliases: other names, without dashes; each may be spelled with underscores or hyphens.
        argparse_arguments: further arguments of `argparse.ArgumentParser.add_argument`.
    """
    spelled = [
        f"--{spelling}"
        for name in aliases
        for spelling in dict.fromkeys((name, name.replace("_", "-")))
    ]
    metadata = {"help": text, "aliases": spelled, **argparse_arguments}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _Help(argparse.HelpFormatter):
    """Every option once, with its default if it has one."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(name for name in action.option_strings if "-" not in name[2:])

    def _get_help_string(self, action: argparse.Action) -> str:
        default = "" if action.default in (None, [], "") else " (%(default)s)"
        return f"{action.help or ''}{default}"


def make_parser(dataclass_types: Sequence[type], **texts: str) -> argparse.ArgumentParser:
    """A parser with one option per dataclass field that raises `CommandError` instead of printing
    usage.

    ``texts``: usage, description and epilog of its help.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise CommandError(message)

    kinds: list = list(dataclass_types)
    for kind in kinds:
        # the heading of its options: RunOptions are "run"
        if kind.__module__.startswith(__package__):
            kind._argument_group_name = kind.__name__.removesuffix("Options").lower()
    parser = Parser(kinds, allow_abbrev=False, add_help=False, formatter_class=_Help, **texts)
    for action in parser._actions:
        action.type = _path if action.type is Path else action.type
        if isinstance(action, argparse._AppendAction):
            # HfArgumentParser lets every list take several values; this one is repeated instead
            action.nargs = None
    return parser


def _path(text: str) -> Path:
    """Refuse an empty text, as of a shell's variable without a value: it would be the current
    folder."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def _normal(name: str) -> str:
    """The name of an option without dashes and value: ``--like-this=3`` is ``like_this``."""
    return name.partition("=")[0].lstrip("-").replace("-", "_")


def option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Every option by its underscore name, without the dashes."""
    return {_normal(flag): action for flag, action in parser._option_string_actions.items()}


def _is_flag(token: str) -> bool:
    return token.startswith("--") and len(token) > 2


def _tokens_of(file: str | os.PathLike[str], known: Mapping[str, argparse.Action]) -> list[str]:
    """A JSON or YAML mapping of options as tokens; what is null there keeps its default."""
    from mpoe.data.mappings import read_mapping

    tokens: list[str] = []
    for name, value in read_mapping(file, "configuration file").items():
        if value is None:
            continue
        if isinstance(value, list) and _normal(name) in known and known[_normal(name)].nargs == "+":
            words = list(map(str, value))
            for word in filter(_is_flag, words):
                raise ValueError(f"{file}: {name} must not hold an option; got {word!r}")
            tokens += [f"--{name}", *words]
        else:
            is_nested = isinstance(value, (dict, list))
            # YAML has dates, JSON none
            text = json.dumps(value, default=str) if is_nested else value
            tokens.append(f"--{name}={text}")
    return tokens


def parse(
    kinds: Sequence[type],
    flags: Sequence[str],
    config: str | os.PathLike[str] | None = None,
    most_words: int = 0,
) -> Request:
    """Fill the dataclasses ``kinds`` from a configuration file and flags.

    Args:
        kinds: dataclasses whose fields are the known options; field names must be unique.
        flags: command-line tokens; they override the file.
        config: JSON or YAML file, or None.
        most_words: words that may be no option's, such as the name of a model.

    Raises:
        CommandError: unknown option (with similar names), a value of the wrong type (naming file or
            flag), or a value that a dataclass refuses.
    """
    parser = make_parser(kinds)
    known = option_names(parser)
    namespace = argparse.Namespace()
    given = set()
    try:
        of_file = [] if config is None else _tokens_of(config, known)
    except ValueError as error:
        raise CommandError(str(error)) from None
    # argparse keeps values already in the namespace unless a flag sets them, so flags win
    for place, tokens in ((f"{config}: ", of_file), ("", flags)):
        _check_flags(place, tokens, known)
        given |= {known[_normal(token)].dest for token in tokens if _is_flag(token)}
        if most_words:
            tokens = _with_values(tokens, known)
        try:
            namespace, words = parser.parse_known_args(tokens, namespace)
        except CommandError as error:
            raise CommandError(f"{place}{error}") from None
        stray = [word for word in words if word.startswith("-")] or words[most_words:]
        if stray:
            raise CommandError(f"{place}values without an option: {' '.join(map(repr, stray))}")
    # the flags' words; the file has none
    return Request(tuple(_build(kind, namespace, given) for kind in kinds), given, words)


def _check_flags(place: str, tokens: Sequence[str], known: Mapping[str, argparse.Action]) -> None:
    """Refuse unknown options, and the value ``--``, which argparse would drop."""
    for flag in filter(_is_flag, tokens):
        option_name = _normal(flag)
        if option_name not in known:
            meant = _FOREIGN_NAMES.get(option_name)
            hint = f"; did you mean '--{meant}'?" if meant in known else ""
            hint = hint or close_matches(f"--{option_name}", [f"--{name}" for name in known])
            raise CommandError(f"{place}unknown option {flag.partition('=')[0]!r}{hint}")
        if flag.partition("=")[2] == "--":
            raise CommandError(f"{place}{flag[:-3]} must have a value; got '--'")


def _with_values(tokens: Sequence[str], known: Mapping[str, argparse.Action]) -> list[str]:
    """The tokens, in which a switch in front of a word does not take it for its value."""
    valued = []
    for token, after in itertools.zip_longest(tokens, tokens[1:], fillvalue=""):
        is_alone = _stands_alone(token, known) and after.lower() not in _BOOLEANS
        valued.append(f"{token}=true" if is_alone else token)
    return valued


def _stands_alone(token: str, known: Mapping[str, argparse.Action]) -> bool:
    return _is_flag(token) and "=" not in token and known[_normal(token)].nargs == "?"


def _build(kind: type, namespace: argparse.Namespace, given: set[str]) -> Any:
    values = {f.name: getattr(namespace, f.name) for f in dataclasses.fields(kind) if f.init}
    for name, least in getattr(kind, "LEAST", ()):
        if values[name] is not None and values[name] < least:
            raise CommandError(f"{name} must be at least {least}; got {values[name]}")
    try:
        # Transformers prints advice on some values
        with contextlib.redirect_stdout(io.StringIO()):
            return kind(**values)
    except _CONSTRUCTION_ERRORS as error:
        # Transformers' errors may not name an option: find the one whose value they repeat, or name
        # all given ones.
        message = str(error)
        given_values = {name: values[name] for name in given & values.keys()}
        if not any(name in message for name in given_values):
            repeated = [name for name, value in given_values.items() if repr(value) in message]
            named = ", ".join(sorted(repeated or given_values))
            message = f"{named}: {message}" if named else message
        raise CommandError(message) from error


def as_command(
    *groups: type, words: tuple[int, int] = (0, 0), config: bool = False, usage: str = ""
) -> Callable[[Callable[[Request], Any]], Callable[[Sequence[str]], Any]]:
    """A decorator: a function of a `Request` becomes a command of tokens, whose help is its
    module's docstring.

    Args:
        groups: dataclasses whose fields are the options.
        words: the fewest and the most words that are no option's, such as the name of a model.
        config: the first word may be a configuration file.
        usage: the usage line, whose second word is the command; default: that of the module's name.

    The command raises `CommandError`: see `parse`; also for too few words. Without
    arguments, one that needs some prints its help; one with configurations, the short help.
    """

    def declare(body: Callable[[Request], Any]) -> Callable[[Sequence[str]], Any]:
        line = usage or COMMANDS[body.__module__.rpartition(".")[2]].usage
        name = line.split()[1]
        about = str(sys.modules[body.__module__].__doc__ or "").strip().split("\n\n")[0]

        @functools.wraps(body)
        def run(arguments: Sequence[str]) -> Any:
            if config and not arguments:
                return show_short_help(name)
            if HELP & set(arguments) or (words[0] and not arguments):
                return show_help(line, about, groups)
            if not arguments:  # without Transformers, whose import takes a second
                return body(Request(tuple(kind() for kind in groups), set()))
            file = arguments[0] if config and not _is_flag(arguments[0]) else None
            flags = arguments if file is None else arguments[1:]
            request = parse(groups, flags, file, words[1])
            if len(request.words) < words[0]:
                needed = "a model first" if words[0] == 1 else "two arguments"
                raise CommandError(f"{name} needs {needed}: {line} (see mpoe {name} --help)")
            return body(request._replace(typed=shlex.join(["mpoe", name, *arguments])))

        return run

    return declare


def show_help(usage: str, about: str, groups: Sequence[type]) -> None:
    """Print all options; those that the groups inherit from Transformers by name."""
    parser = make_parser(
        groups, usage=usage, description=f"{about} Options are spelled --like_this or --like-this."
    )
    inherited = sorted(
        field.name
        for kind in groups
        for base in kind.__bases__
        if base.__module__.startswith("transformers.")
        for field in dataclasses.fields(base)
        if field.init and field.name not in kind.__annotations__
    )
    if inherited:
        parser.epilog = (
            f"And every option of transformers.TrainingArguments: {', '.join(inherited)}"
        )
    for action in parser._actions:
        action.help = argparse.SUPPRESS if action.dest in inherited else action.help
    parser.print_help()
