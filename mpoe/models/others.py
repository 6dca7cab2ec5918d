"""What Transformers and other tools see of a model: the fields of its outputs, its files and their card.

A model card that a user wrote or edited is never replaced: a generated card ends with its own checksum, and only a file
whose checksum still matches is replaced.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from torch import Tensor
from transformers.utils.generic import ModelOutput

from mpoe.data.mappings import flatten
from mpoe.models.report import kept_modules, mpo_modules, parameter_report
from mpoe.models.weight_files import write_text

ROUTING_FIELDS = ("task_loss", "aux_loss", "router_logits", "expert_load")


@dataclass
class RoutingFields:
    """Fields that every MPOE model adds to its family's output.

    Attributes:
        task_loss: the loss without ``aux_loss``; present when labels are given.
        aux_loss: weighted sum over layers of the load-balancing and z-losses, float32 scalar.
        router_logits: raw logits per layer in order of execution, float32 ``[B * S, E]`` each.
        expert_load: slots each expert worked on, int64 ``[layers, E]``, detached; padding and dropped tokens are not
            counted.
    """

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    expert_load: Tensor | None = None


@functools.cache
def output_with_routing(dense: type[ModelOutput]) -> type[ModelOutput]:
    """``dense`` with `RoutingFields`, named ``MPOE<dense>``."""
    documentation = f"`{dense.__name__}` with `RoutingFields`."
    made = type(f"MPOE{dense.__name__}", (RoutingFields, dense), {"__doc__": documentation, "__module__": __name__})
    return dataclass(made)


def output_of(forward: Callable[..., Any]) -> type[ModelOutput]:
    """The output class of a dense model's ``forward``, by its annotation, with `RoutingFields`."""
    annotation = get_type_hints(forward)["return"]
    found = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return output_with_routing(next(kind for kind in found if issubclass(kind, ModelOutput)))


CARD_FILE = "README.md"
_SEAL = re.compile(r"<!-- mpoe card ([0-9a-f]{16}) -->\n\Z")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PAPER = "[Gao et al., COLING 2022](https://arxiv.org/abs/2203.01104)"
TEMPLATE = "This model card has been automatically generated."  # Transformers' card for a repository without one
_PARTS = ("central", "auxiliary", "expert", "router", "rest")


def model_card(model: Any, metrics: Mapping[str, Any] | None = None) -> str:
    """Markdown with the metadata block of the Hugging Face hub.

    Args:
        model: an MPOE model.
        metrics: name -> number; nested mappings get dotted names, other values are left out.
    """
    base = base_name(model)
    has_mpo = parameter_report(model)["central"]
    shared = f" All experts of a layer share the central core of a matrix product operator ({_PAPER})." * bool(has_mpo)
    metadata = ["---", "library_name: transformers", "tags:", "- mpoe", "- mixture-of-experts"]
    parts = [
        "\n".join([*metadata, *([f"base_model: {base}"] if base else []), "---"]),
        f"# {type(model).__name__.removeprefix('FSDP')}",
        f"A Transformers model whose feed-forward networks are mixtures of experts.{shared}",
        _table("property", facts(model)),
        "## Use",
        "```python\nfrom mpoe import load_mpoe\n\nmodel = load_mpoe(folder)  # the folder of this file\n```",
    ]
    numbers = {name: f"{value:.4g}" for name, value in flatten(metrics or {}) if type(value) in (int, float)}
    if numbers:
        parts += ["## Results", _table("metric", numbers)]
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- mpoe card {_checksum(text)} -->\n"


def facts(model: Any) -> dict[str, str]:
    """What an MPOE model is, in words and numbers by name."""
    config, report, base = model.mpoe_config, parameter_report(model), base_name(model)
    experts = f"{config.num_experts}, top-{config.top_k}" if config.moe_type != "none" else "1, no routers"
    kind = "matrix product operators" if config.expert_type == "mpo" and report["central"] else "full matrices"
    shapes = [str(cores.shape) for _, cores in mpo_modules(model)]
    shapes += [f"{layer.shape}, {layer.experts.extra_repr()}" for layer in kept_modules(model).values()]
    return {
        "base model": f"`{base}`" if base else "not recorded",
        "experts": f"{experts}; {kind}",
        "mixture": f"`moe_type={config.moe_type}`, modules {', '.join(config.targets)}",
        **{f"shape {k}": f"`{shape}`" for k, shape in enumerate(dict.fromkeys(shapes), start=1)},
        "parameters": f"{report['total']:,}",
        "of them": ", ".join(f"{name} {report[name]:,}" for name in _PARTS if report[name]),
        "dense model": f"{report['dense_total']:,} parameters",
        "as many dense experts": f"{report['switch_total']:,} parameters",
    }


def may_write_card(file: Path) -> bool:
    """Whether ``file`` is absent, or a generated card that nobody has edited."""
    if not file.exists():
        return True
    text = file.read_text(encoding="utf-8", errors="replace")
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _checksum(text[: seal.start() - 1])


def write_card(model: Any, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> bool:
    """Write `model_card` into ``folder``, atomically and never through a link, unless a user's card is there; returns
    whether it was written."""
    file = Path(folder) / CARD_FILE
    if not may_write_card(file):
        return False
    write_text(file, model_card(model, metrics))
    return True


def base_name(model: Any) -> str:
    """The hub name of the converted dense model; empty for a local folder, whose path is private."""
    name = str(getattr(model.config, "mpoe_base", None) or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else ""


def _table(first: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {first} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


REMOTE_FILE = "modeling_mpoe.py"
REMOTE_CODE = '''"""Opens this model in programs that do not import mpoe (with ``trust_remote_code=True``)."""

try:
    from mpoe.models import {names}
except ImportError as error:
    raise ImportError('this model needs the package mpoe: pip install "mpoe>={version}"') from error
'''
