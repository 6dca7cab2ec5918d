"""`mpoe info [FILE ...]`: versions, available kernel backends, why the others cannot run here, devices and cores.

Of experts' files, and of folders of composed mixtures, it says instead what each expert was trained beside and on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mpoe.cli.parsing import option, read_command

MOST = 128  # files
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "matplotlib", "datasets")


@dataclass
class InfoOptions:
    """How to show the facts."""

    _argument_group_name = "output"

    json: bool = option(False, "print JSON instead of tables")


def command(arguments: Sequence[str]) -> None:
    """Run the command on its tokens."""
    asked = read_command("mpoe info [FILE ...] [--json]", __doc__, [InfoOptions], arguments, words=MOST if arguments else 0)
    if asked is None:
        return
    if asked.words:
        from mpoe.cli.expert_facts import collect_experts, show_experts

        experts = collect_experts(asked.words)
        print(json.dumps(experts, indent=2)) if asked.options[0].json else show_experts(experts)
        return
    facts = collect()
    if asked.options[0].json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts)


def collect() -> dict[str, Any]:
    """Everything `mpoe info` shows, JSON-able: `mpoe_kernels.info.collect` with more packages."""
    from mpoe_kernels.info import collect

    return collect(PACKAGES)


def show(facts: dict[str, Any]) -> None:
    """Print the facts of `collect` as tables."""
    from rich.console import Console
    from rich.table import Table

    from mpoe_kernels.info import rows

    console = Console()
    table = Table(title=f"mpoe {facts['mpoe']}", show_header=False)
    for name, text in rows(facts):
        table.add_row(name, text)
    console.print(table)
    backends = Table("backend", "runs here", "why not", title="Kernel backends")
    for name, reasons in facts["backends"].items():
        backends.add_row(name, "no" if reasons else "yes", "; ".join(reasons))
    console.print(backends)
