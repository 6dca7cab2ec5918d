"""What `mpoe info` says of experts' files and composed mixtures: what each expert needs, and what it was made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpoe.cli.errors import CommandError

if TYPE_CHECKING:
    from mpoe.models.expert_files import Expert

SHOWN = 12  # characters of a SHA-256


def facts_of(expert: Expert) -> dict[str, Any]:
    """JSON-able facts of an expert; sizes in bytes."""
    sizes = {kind: sum(each.nbytes for each in getattr(expert, kind).values()) for kind in ("weights", "statistics")}
    return {**expert.facts, "parameters": sum(each.numel() for each in expert.weights.values()), "bytes": sizes}


def collect_experts(names: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Facts by file, or by folder of a composed mixture.

    Raises:
        CommandError: what is neither.
        ValueError: a damaged file.
    """
    from mpoe.models.expert_files import load_expert
    from mpoe.models.expert_mixture import EXPERTS_FOLDER, kept_experts

    found = {}
    for name in names:
        place = Path(name)
        if not place.is_file() and not (place / EXPERTS_FOLDER).is_dir():
            raise CommandError(f"info takes experts' files and mixtures that mpoe compose made of them; {name} is none")
        experts = [load_expert(place)] if place.is_file() else kept_experts(place)[0]
        found[name] = [facts_of(expert) for expert in experts]
    return found


def show_experts(found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the facts of `collect_experts`, a table for each expert."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, experts in found.items():
        console.print(f"[bold]{name}[/bold]", soft_wrap=True)
        for each in experts:
            weights, statistics = (each["bytes"][kind] / 1e6 for kind in ("weights", "statistics"))
            table = Table(show_header=False, box=None)
            table.add_row("expert", f"{each['name']}: {each['neurons']} neurons per layer, {weights:.1f} MB")
            table.add_row("base", f"{each['model']} {each['base_name']}, SHA-256 {each['base'][:SHOWN]}")
            table.add_row("tokenizer", (each["tokenizer"] or "any")[:SHOWN])
            table.add_row("statistics", f"{statistics:.2f} MB" if statistics else "none: it cannot be composed")
            table.add_row("training", ", ".join(f"{key} {value}" for key, value in each["training"].items()))
            console.print(table)
