"""Components of a model, by the original's names: which one a module belongs to, and taking some from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpoe.config.checks import check_choice
from mpoe.layers.cores import MPOCores
from mpoe.layers.feed_forward import RoutedFeedForward
from mpoe.models.base import MPOEModelMixin
from mpoe.models.checkpoint import parsed_mpoe, read_mpoe_config, set_rate_ratios
from mpoe.models.report import mpo_modules
from mpoe.models.weight_files import ONLY_FILE, declared_shapes, read_tensors, weight_files

COMPONENTS = ("word_embed", "mlp", "attention", "pooler")
_ALIASES = {"ffn": "mlp", "embedding": "word_embed", "embeddings": "word_embed"}
# Words in a module's name that identify its component; the first component that matches wins (BERT's FFN is at
# `encoder.layer.0.…`, its attention's output at `…attention.output.dense`).
_WORDS = {
    "pooler": ("pooler",),
    "word_embed": ("shared", "embed", "wte", "lm_head"),
    "attention": ("attn", "attention"),
    "mlp": ("experts", "mlp", "feed_forward", "densereludense", "intermediate", "output"),
}


def component_of(name: str) -> str:
    """The component (one of `COMPONENTS`) that a module of this name belongs to."""
    lowered = name.lower()
    for component, words in _WORDS.items():
        if any(word in lowered for word in words):
            return component
    return "mlp"


def parse_components(text: str | None, option: str = "update_mpo_layer") -> tuple[str, ...] | None:
    """'mlp, attention' -> ('mlp', 'attention'); None means all. Raises ValueError on unknown names, for ``option``."""
    if text is None:
        return None
    names = [part.strip().lower() for part in text.split(",") if part.strip()]
    names = [_ALIASES.get(name, name) for name in names]
    for name in names:
        check_choice(option, name, COMPONENTS)
    if not names:
        raise ValueError(f"{option} must name at least one of {', '.join(COMPONENTS)}; got {text!r}")
    return tuple(dict.fromkeys(names))


def _modules_of(model: nn.Module, components: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """Whole feed-forward networks (router and biases too) and single MPO matrices, by name."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, RoutedFeedForward):
            inside = (*inside, f"{name}.")
            if "mlp" in components:
                yield name, module
        elif isinstance(module, MPOCores) and not name.startswith(inside) and component_of(name) in components:
            yield name, module


@torch.no_grad()
def load_layers(model: Any, path: str | Path, components: Sequence[str]) -> list[str]:
    """Replace the MPO parameters of ``components`` in ``model`` by those of a checkpoint.

    Args:
        model: an MPOE model, changed in place.
        path: folder of a saved MPOE model of the same family, whole or MPOE-only.
        components: of word_embed, mlp (experts with their routers), attention and pooler.

    Returns:
        Names of the modules that were loaded.

    Raises:
        TypeError: a model that is not an MPOE model.
        ValueError: no checkpoint there, a component that the model does not have in MPO form, parameters that are
            missing in the checkpoint or of another shape.
    """
    if not isinstance(model, MPOEModelMixin):
        raise TypeError(f"model must be an MPOE model (see convert_to_mpoe); got {type(model).__name__}")
    folder = Path(path)
    values, _ = read_mpoe_config(folder)
    ratios = parsed_mpoe(values, folder).rate_ratios
    modules = list(_modules_of(model, components))
    found = {"mlp" if isinstance(module, RoutedFeedForward) else component_of(name) for name, module in modules}
    missing = sorted(set(components) - found)
    if missing:
        raise ValueError(f"components must be in MPO form in the model; {', '.join(missing)} is not")
    files = [folder / ONLY_FILE] if (folder / ONLY_FILE).is_file() else weight_files(folder)
    shapes = declared_shapes(files, model)
    for name, module in modules:
        for part, parameter in module.named_parameters():
            key = f"{name}.{part}"
            if key not in shapes:
                raise ValueError(f"{folder} must hold {key}; it does not (is it a checkpoint of another model?)")
            if shapes[key] != parameter.shape:
                raise ValueError(f"{key} must be {list(parameter.shape)}; {folder} has {list(shapes[key])}")
    tensors = read_tensors(files)
    loaded = tuple(name for name, _ in modules)
    set_rate_ratios({n: cores for n, cores in mpo_modules(model) if n.startswith(loaded)}, ratios, folder)
    for name, module in modules:
        for part, parameter in module.named_parameters():
            parameter.copy_(tensors[f"{name}.{part}"])
    return list(loaded)
