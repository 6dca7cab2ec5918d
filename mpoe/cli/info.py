"""`mpoe info [FILE ...]`: versions, available kernel backends, why the others cannot run here,
devices and cores.

Of experts' files, and of folders of composed mixtures, it says instead what each expert was trained
beside and on, and of mixtures how they are routed: experts per token, *none* and its background."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpoe.cli.command import Request, as_command, option
from mpoe.cli.errors import CommandError
from mpoe.data.mappings import flatten, read_mapping
from mpoe_kernels import info

MOST = 128  # files
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "matplotlib",
    "datasets",
)


@dataclass
class InfoOptions:
    """How to show the facts."""

    json: bool = option(False, "print JSON instead of tables")


@as_command(InfoOptions, words=(0, MOST))
def command(request: Request) -> None:
    """Show the facts of this machine, or of experts."""
    (options,), files = request.options, request.words
    collected = {name: list(facts_of(Path(name))) for name in files} or info.collect(PACKAGES)
    if options.json or not files:
        print(json.dumps(collected, indent=2) if options.json else info.show(collected))
        return
    from mpoe.cli.report import Table

    for name, experts in collected.items():
        for described in experts:
            rows = [(key, str(value)) for key, value in flatten(described) if key != "name"]
            Table((), rows, f"{name}: {described['name']}", kind="text").show()


def facts_of(place: Path) -> Iterator[dict]:
    """JSON-able facts of experts, sizes in bytes: of the one in a file, or of a composed mixture's
    after its own.

    Raises:
        CommandError: neither.
        ValueError: a damaged file.
    """
    from mpoe.models.expert_files import load_expert
    from mpoe.models.expert_mixture import EXPERTS_FOLDER, experts_in
    from mpoe.training.published import finish

    finish(place)
    if not place.is_file() and not (place / EXPERTS_FOLDER).is_dir():
        raise CommandError(
            f"info takes experts' files and mixtures that mpoe compose made of them; {place} is "
            "none"
        )
    experts = [load_expert(place)] if place.is_file() else experts_in(place)[0]
    if place.is_dir():
        yield mixture_facts(place, experts)
    for expert in experts:
        sizes = {
            kind: sum(t.nbytes for t in getattr(expert, kind).values())
            for kind in ("weights", "statistics")
        }
        parameters = sum(tensor.numel() for tensor in expert.weights.values())
        yield {**expert.facts, "parameters": parameters, "bytes": sizes}


def mixture_facts(place: Path, experts: Sequence) -> dict:
    """JSON-able facts of a composed mixture, of which the experts say the rest."""
    from mpoe.models.composition import NONE
    from mpoe.models.expert_mixture import BACKGROUND_FILE, mixture_config

    values = read_mapping(place / "config.json", "configuration")
    names, config, _ = mixture_config(place)
    none = "absent"
    background = "absent"
    if NONE in names:
        none = "adds nothing: what is like the background stays as in the base"
        background = f"{BACKGROUND_FILE}, {(place / BACKGROUND_FILE).stat().st_size:,} bytes"
    routing = (values.get("mpoe_routing") or {}).items()
    first = experts[0].facts
    return {
        "name": "the mixture",
        "base": first["base"],
        "base_name": first["base_name"],
        "model": first["model"],
        "experts": names,
        "none": none,
        "background": background,
        "experts_per_token": config.top_k,
        "routing": {name: value for name, value in routing if value is not None} or "defaults",
    }
