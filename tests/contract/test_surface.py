"""Nothing that a user could name when `surface.json` was written is gone or has another default;
more may be there.

``python -m tests.contract.test_surface`` prints today's names as JSON. What changes on purpose,
with a line in the changelog, changes in the file too.
"""

import argparse
import dataclasses
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

from mpoe.cli.command import make_parser

COMMANDS = "train evaluate convert plan inspect generate demo bench info".split()
MODULES = (
    """mpoe mpoe.config mpoe.data mpoe.layers mpoe.models mpoe.training mpoe_kernels""".split()
)
FURTHER = ("mpoe.models.base.MPOEModelMixin",)  # documented, in no `__all__`
FOREIGN = ("torch", "transformers", "peft", "builtins", "accelerate")


def names():
    """Dotted public name -> what it is."""
    found = {}
    for module in MODULES:
        for name in importlib.import_module(module).__all__:
            found[f"{module}.{name}"] = _described(getattr(importlib.import_module(module), name))
    for path in FURTHER:
        module, _, name = path.rpartition(".")
        found[path] = _described(getattr(importlib.import_module(module), name))
    return found


def _described(value):
    if inspect.isclass(value):
        return {"kind": "class", "parameters": _own_parameters(value), "members": _members(value)}
    if callable(value):
        return {"kind": "function", "parameters": _parameters(value)}
    return {"kind": "value", "keys": sorted(map(str, value)) if isinstance(value, dict) else None}


def _parameters(function):
    """Name -> kind and default."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return {}
    return {
        name: f"{parameter.kind.name} {_shown(parameter.default)}"
        for name, parameter in signature.parameters.items()
        if name != "self"
    }


def _shown(default):
    """A default without addresses, which differ from run to run."""
    if isinstance(default, frozenset):
        return "a set"
    return (
        "required"
        if default is inspect.Parameter.empty
        else re.sub(r" at 0x[0-9a-f]+", "", repr(default))
    )


def _own_parameters(kind):
    """Parameters of the constructor, without those that a class of another library declares."""
    parameters = _parameters(kind)
    foreign = {
        field.name
        for base in kind.__mro__
        if base.__module__.startswith(FOREIGN) and dataclasses.is_dataclass(base)
        for field in dataclasses.fields(base)
    }
    own = set().union(
        *(vars(b).get("__annotations__", {}) for b in kind.__mro__ if not _foreign(b))
    )
    return {name: text for name, text in parameters.items() if name not in foreign or name in own}


def _foreign(kind):
    return kind.__module__.startswith(FOREIGN)


def _members(kind):
    """Public methods, properties and attributes of a class and of the bases that are ours."""
    found = {}
    for base in reversed([base for base in kind.__mro__ if not _foreign(base)]):
        for name, member in vars(base).items():
            if name.startswith("_"):
                continue
            plain = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
            found[name] = _parameters(plain) if inspect.isfunction(plain) else "attribute"
    return found


def options():
    """Command -> option as it is written -> its default, whether it may stand alone, whether it
    takes several values.

    Of the Trainer's own arguments, which differ from release to release, only those are listed that
    are declared here.
    """
    from transformers import Seq2SeqTrainingArguments

    from mpoe.training import MPOETrainingArguments

    ours = set(vars(MPOETrainingArguments)["__annotations__"])
    theirs = {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)} - ours
    return {
        command: {
            option: {
                "default": _jsonable(action.default),
                "alone": action.nargs in (0, "?"),
                "several": action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction),
            }
            for action in parser_of(command)._actions
            if command != "train" or action.dest not in theirs
            for option in action.option_strings
        }
        for command in COMMANDS
    }


def parser_of(command):
    """The parser of a command's options."""
    declared = importlib.import_module(f"mpoe.cli.{command}").command  # by `as_command`
    return make_parser(inspect.getclosurevars(declared).nonlocals["groups"])


def _jsonable(value):
    return (
        value if value is None or isinstance(value, (bool, int, float, str, list)) else str(value)
    )


def missing(earlier, today, path=""):
    """Where ``today`` lacks or changes something of ``earlier``."""
    found = []
    if path.endswith(": parameters: ") and not _starts_like(today, earlier):
        found.append(f"{path}other arguments by position")
    for name, value in earlier.items():
        place = f"{path}{name}"
        if name not in today:
            found.append(f"{place} is gone")
        elif isinstance(value, dict) and isinstance(today[name], dict):
            found += missing(value, today[name], f"{place}: ")
        elif value != today[name]:
            found.append(f"{place} was {value!r}, is {today[name]!r}")
    return found


def _starts_like(today, earlier):
    """Whether what could be given by position still can."""
    old, new = (
        [n for n, text in each.items() if text.startswith("POSITIONAL")]
        for each in (earlier, today)
    )
    return new[: len(old)] == old


EARLIER = json.loads(Path(__file__).with_name("surface.json").read_text())


@pytest.mark.parametrize("kind, today", [("names", names), ("options", options)])
def test_nothing_is_gone(kind, today):
    assert missing(EARLIER[kind], today()) == []


if __name__ == "__main__":
    print(json.dumps({"names": names(), "options": options()}, indent=1))
