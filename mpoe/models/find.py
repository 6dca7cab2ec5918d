"""`find_sites`: which dense modules of a model a configuration converts."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

from mpoe.config import MPOEConfig
from mpoe.config.shapes import pattern_matches
from mpoe.layers.activations import check_activation
from mpoe.models.families import Family
from mpoe.models.hidden import HiddenSite
from mpoe.models.sites import EmbeddingSite, FFNSite, LinearSite, Site


def _child(module: nn.Module, name: str) -> nn.Module | None:
    for part in filter(None, name.split(".")):
        module = getattr(module, part, None)  # type: ignore[assignment]
        if module is None:
            return None
    return module


def _ffn_sites(model: nn.Module, family: Family, model_config: Any) -> Iterator[FFNSite]:
    for name, module in model.named_modules():
        match = family.ffn.match(name)
        if match is None:
            continue
        up_name = next((n for n in family.up if _child(module, n) is not None), None)
        if up_name is None or _child(module, family.down) is None:
            continue
        kinds = {"up": up_name, "down": family.down}
        if family.gate_proj is not None and _child(module, family.gate_proj) is not None:
            kinds["gate_proj"] = family.gate_proj
        dense = {kind: module.get_submodule(n) for kind, n in kinds.items()}
        if "gate_proj" in dense and getattr(dense["gate_proj"], "bias", None) is not None:
            raise ValueError(f"{name}.{kinds['gate_proj']} must have no bias: the gates of experts have none")
        up_std, down_std = family.init_std(model_config)
        yield FFNSite(
            name=f"{name}.{family.place}" if family.place else name,
            stream=match.groupdict().get("stream") or "main",
            layer=int(match["layer"]),
            dense=dense,
            prefixes={kind: f"{name}.{n}" for kind, n in kinds.items()},
            options={
                "activation": check_activation(family.activation(model_config)),
                "gated": "gate_proj" in kinds,
                "bias": getattr(dense["up"], "bias", None) is not None,
                "dropout": float(family.dropout(model_config)),
                "output_dropout": float(family.output_dropout(model_config)),
                "init_std": {"up": up_std, "gate_proj": up_std, "down": down_std},
            },
            residual=None if family.residual is None else f"{name}.{family.residual}",
        )


def _linear_sites(model: nn.Module, family: Family, config: MPOEConfig) -> Iterator[LinearSite]:
    for name, module in model.named_modules():
        match = family.attention.match(name) if "attention" in config.targets else None
        if match is not None:
            yield LinearSite("attention", name, int(match["layer"]), module)
        elif "pooler" in config.targets and family.pooler is not None and family.pooler.match(name):
            yield LinearSite("pooler", name, None, module)


def _embedding_site(model: Any, model_config: Any) -> EmbeddingSite | None:
    """The table of ``model``, with the modules that its class ties to it."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return None
    name = next(n for n, module in model.named_modules() if module is table)
    ties = type(model)._tied_weights_keys or {}
    targets = [target.removesuffix(".weight") for target, source in ties.items() if source == f"{name}.weight"]
    views = tuple(n for n in targets if isinstance(model.get_submodule(n), nn.Embedding))
    head = next((n for n in targets if n not in views), None)
    # T5 draws its table with standard deviation 1 (times a factor), the others with their initializer_range.
    std = getattr(model_config, "initializer_factor", getattr(model_config, "initializer_range", 1.0))
    return EmbeddingSite(name, table, views, head, float(std))


def _excluded(name: str, patterns: list[str]) -> bool:
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _check_patterns(names: list[str], config: MPOEConfig) -> None:
    """Refuse exclusions and shape patterns that match none of ``names``."""
    for field, patterns in (("exclude_modules", config.exclude_modules), ("shape_pattern", config.shape_pattern)):
        for pattern in patterns:
            fits = _excluded if field == "exclude_modules" else lambda name, one: pattern_matches(one[0], name)
            if not any(fits(name, [pattern]) for name in names):
                close = get_close_matches(pattern, names, n=3, cutoff=0.3)
                hint = f"; close matches: {', '.join(close)}" if close else ""
                raise ValueError(f"{field} names {pattern!r}, which is none of the {len(names)} targets{hint}")


def _select(sites: list[Site], config: MPOEConfig) -> list[Site]:
    _check_patterns([site.name for site in sites], config)
    layers = config.layers_to_transform
    known = sorted({site.layer for site in sites if site.layer is not None})
    for index in layers or []:
        if index not in known:
            wanted = f"layer indices {known[0]}..{known[-1]}" if known else "nothing: no target lies in a layer"
            raise ValueError(f"layers_to_transform must hold {wanted}; got {index}")
    return [
        site
        for site in sites
        if not _excluded(site.name, config.exclude_modules)
        and (layers is None or site.layer is None or site.layer in layers)
    ]


def find_sites(model: nn.Module, family: Family, model_config: Any, config: MPOEConfig) -> list[Site]:
    """Dense modules of ``model`` that ``config`` converts.

    Raises:
        ValueError: nothing to convert, ``exclude_modules``, ``shape_pattern`` or ``layers_to_transform`` that match
            nothing, an activation experts cannot compute, feed-forward chunking.
    """
    if getattr(model_config, "chunk_size_feed_forward", 0):
        raise ValueError(
            "chunk_size_feed_forward must be 0 for a mixture of experts, which routes all tokens of a call at once; "
            f"got {model_config.chunk_size_feed_forward}"
        )
    sites: list[Site] = list(_ffn_sites(model, family, model_config)) if "ffn" in config.targets else []
    sites += _linear_sites(model, family, config)
    table = _embedding_site(model, model_config) if "embedding" in config.targets else None
    if table is not None:
        sites.append(table)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no dense {' or '.join(config.targets)} modules to convert")
    chosen = _select(sites, config)
    if not chosen:
        raise ValueError(
            "nothing is left to convert: layers_to_transform and exclude_modules leave out every module; got "
            f"layers_to_transform={config.layers_to_transform}, exclude_modules={config.exclude_modules}"
        )
    return [HiddenSite.of(s) if isinstance(s, FFNSite) and config.for_experts(s.name).is_hidden else s for s in chosen]
