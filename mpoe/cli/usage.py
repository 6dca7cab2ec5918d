"""What `--help` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        return " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return ""


def show_commands(commands: Mapping[str, str]) -> None:
    """Print the commands, each with a line about it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print("[bold]Usage:[/bold] mpoe [--version] [--help] [--debug] COMMAND ...\n", highlight=False)
    console.print("Turn a pretrained T5, GPT-2, Llama or BERT into a parameter-efficient mixture of experts.\n")
    table = Table("command", "what it does")
    for name, text in commands.items():
        table.add_row(name, escape(text))
    console.print(table)
    console.print("mpoe COMMAND --help lists the options of a command.", highlight=False)


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
