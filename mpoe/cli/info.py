"""`mpoe info [FILE ...]`: versions, available kernel backends, why the others cannot run here, devices and cores.

Of experts' files, and of folders of composed mixtures, it says instead what each expert was trained beside and on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpoe.cli.command import Asked, CommandError, as_command, option

MOST = 128  # files
PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy", "safetensors", "matplotlib", "datasets")


@dataclass
class InfoOptions:
    """How to show the facts."""

    json: bool = option(False, "print JSON instead of tables")


@as_command("mpoe info [FILE ...] [--json]", InfoOptions, words=(0, MOST))
def command(asked: Asked) -> None:
    """Show the facts of this machine, or of experts."""
    from mpoe_kernels import info

    (options,), files = asked.options, asked.words
    found = collect_experts(files) if files else info.collect(PACKAGES)
    if options.json:
        print(json.dumps(found, indent=2))
    elif files:
        from mpoe.cli.report import Table

        for name, experts in found.items():
            for each in experts:
                rows = [(key, str(value)) for key, value in each.items() if key != "name"]
                Table((), rows, f"{name}: {each['name']}", kind="text").show()
    else:
        print(info.show(found))


def collect_experts(names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """JSON-able facts of experts, sizes in bytes, by file or by folder of a composed mixture.

    Raises:
        CommandError: what is neither.
        ValueError: a damaged file.
    """
    from mpoe.models.expert_files import load_expert
    from mpoe.models.expert_mixture import EXPERTS_FOLDER, kept_experts

    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        place = Path(name)
        if not place.is_file() and not (place / EXPERTS_FOLDER).is_dir():
            raise CommandError(f"info takes experts' files and mixtures that mpoe compose made of them; {name} is none")
        found[name] = []
        for each in [load_expert(place)] if place.is_file() else kept_experts(place)[0]:
            sizes = {kind: sum(t.nbytes for t in getattr(each, kind).values()) for kind in ("weights", "statistics")}
            parameters = sum(tensor.numel() for tensor in each.weights.values())
            found[name].append({**each.facts, "parameters": parameters, "bytes": sizes})
    return found
