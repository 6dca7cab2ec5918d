"""The model card: what a converted model is, in Markdown with the hub's metadata."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpoe.data.mappings import flatten
from mpoe.models.report import parameter_report
from mpoe.models.walk import kept_modules, mpo_modules, routed_layers
from mpoe.models.weight_files import write_text

CARD_FILE = "README.md"
_CARD = """---
library_name: transformers
tags:
- mpoe
- mixture-of-experts
{base_model}---

# {name}

A Transformers model whose feed-forward networks are mixtures of experts.{cores}

{facts}

## Use

```python
from mpoe import load_mpoe

model = load_mpoe(folder)  # the folder of this file
```
{results}"""
_SHARED_CORE = (
    " All experts of a layer share the central core of a matrix product operator "
    "([Gao et al., COLING 2022](https://arxiv.org/abs/2203.01104))."
)
# A card ends with its own checksum; one that a user wrote or edited has no such end, and is never
# replaced.
_SEAL = re.compile(r"<!-- mpoe card ([0-9a-f]{16}) -->\n\Z")


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


# Transformers' card for a repository without one
TEMPLATE = "This model card has been automatically generated."


_PARTS = ("central", "auxiliary", "expert", "router", "rest")


def model_card(model: Any, metrics: Mapping[str, Any] | None = None) -> str:
    """Markdown with the metadata block of the Hugging Face hub.

    Args:
        model: an MPOE model.
        metrics: name -> number; nested mappings get dotted names, other values are left out.
    """
    base = base_name(model)
    config = model.mpoe_config
    numbers = {
        name: f"{value:.4g}"
        for name, value in flatten(metrics or {})
        if type(value) in (int, float)
    }
    text = _CARD.format(
        base_model=f"base_model: {base}\n" if base else "",
        name=type(model).__name__.removeprefix("FSDP"),
        cores=_SHARED_CORE if config.expert_type == "mpo" and not config.is_neurons else "",
        facts=_table("property", facts(model)),
        results=f"\n## Results\n\n{_table('metric', numbers)}\n" if numbers else "",
    )
    return f"{text}\n<!-- mpoe card {_checksum(text)} -->\n"


def facts(model: Any) -> dict[str, str]:
    """What an MPOE model is, in words and numbers by name."""
    config = model.mpoe_config
    report = parameter_report(model)
    base = base_name(model)
    experts = (
        f"{config.num_experts}, top-{config.top_k}" if routed_layers(model) else "1, no routers"
    )
    kind = "full matrices" if config.expert_type == "dense" else "matrix product operators"
    if config.is_neurons:
        kind = "hidden neurons beside the dense network"
    shapes = [str(cores.shape) for _, cores in mpo_modules(model)]
    for layer in kept_modules(model).values():
        shapes.append(f"{layer.shape}, {layer.experts.extra_repr()}")
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
    if not os.path.lexists(file):
        return True
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _checksum(text[: seal.start() - 1])


def write_card(model: Any, folder: str | Path, metrics: Mapping[str, Any] | None = None) -> bool:
    """Write `model_card` into ``folder``, atomically and never through a link, unless a user's card
    is there; returns whether it was written."""
    file = Path(folder) / CARD_FILE
    if not may_write_card(file):
        return False
    write_text(file, model_card(model, metrics))
    return True


def base_name(model: Any) -> str:
    """The hub name of the converted dense model; empty for a local folder, whose path is
    private."""
    name = str(getattr(model.config, "mpoe_base", None) or "")
    return name if _HUB_NAME.fullmatch(name) and not Path(name).exists() else ""


def _table(first: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {first} | value |", "|---|---|"]
    for name, value in rows.items():
        lines.append(f"| {name} | {value} |")
    return "\n".join(lines)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
