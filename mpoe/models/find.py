"""Which modules a configuration converts; the dense model with wider networks, the baseline of
equal size."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mpoe.config import MPOEConfig
from mpoe.config.checks import hint
from mpoe.config.shapes import pattern_matches
from mpoe.layers.drop_in import linear_weight
from mpoe.layers.experts import check_activation
from mpoe.models.sites import EmbeddingSite, FFNSite, LinearSite, install_empty
from mpoe.models.table import FFN, TABLE, TYPE_PREFIX, Family, family_for, name_pattern

AnySite = FFNSite | LinearSite | EmbeddingSite


def _dense_parts(holder: nn.Module, ffn: FFN) -> dict[str, nn.Module]:
    """The projections inside ``holder`` by kind; empty if its structure is different."""
    try:
        return {kind: holder.get_submodule(name) for kind, name in ffn.kinds().items()}
    except AttributeError:
        return {}


def _ffn_sites(model: Any, family: Family) -> Iterator[FFNSite]:
    patterns = [(ffn, name_pattern(ffn.holder)) for ffn in family.ffn]
    up_std, down_std = family.init_std(model.config)
    for name, holder in model.named_modules():
        matches = (
            (ffn, match) for ffn, pattern in patterns if (match := pattern.match(name)) is not None
        )
        ffn, match, dense = next(
            ((ffn, m, parts) for ffn, m in matches if (parts := _dense_parts(holder, ffn))),
            (None,) * 3,
        )
        if ffn is None or match is None or dense is None:
            continue
        if getattr(dense.get("gate_proj"), "bias", None) is not None:
            raise ValueError(
                f"{name}.{ffn.kinds()['gate_proj']} must have no bias: the gates of experts have "
                "none"
            )
        width = linear_weight(dense["up"]).shape[1] // max(len(ffn.fused), 1)
        settings = ffn.settings(model.config)
        check_activation(settings["activation"])
        yield FFNSite(
            name=f"{name}.{ffn.place}" if ffn.place else name,
            stream=ffn.stream,
            layer=int(match["layer"]),
            dense=dense,
            prefixes={kind: f"{name}.{part}" for kind, part in ffn.kinds().items()},
            options={
                **settings,
                "gated": "gate_proj" in dense,
                "bias": getattr(dense["up"], "bias", None) is not None,
                "init_std": {"up": up_std, "gate_proj": up_std, "down": down_std},
            },
            columns={
                kind: slice(place * width, (place + 1) * width)
                for place, kind in enumerate(ffn.fused)
            },
            emptied=tuple(f"{name}.{part}" for part in ffn.emptied),
            zeroed=tuple(
                (name, attribute) for attribute in ffn.zeroed if hasattr(holder, attribute)
            ),
            sums=f"{name}.{ffn.sums}" if ffn.sums else "",
        )


def _linear_sites(model: nn.Module, family: Family, config: MPOEConfig) -> Iterator[LinearSite]:
    attention = [name_pattern(glob) for glob in family.attention if "attention" in config.targets]
    pooler = (
        name_pattern(family.pooler)
        if "pooler" in config.targets and family.pooler is not None
        else None
    )
    for name, module in model.named_modules():
        match = next(filter(None, (pattern.match(name) for pattern in attention)), None)
        if match is not None:
            yield LinearSite(name, int(match["layer"]), module, "attention")
        elif pooler is not None and pooler.match(name):
            yield LinearSite(name, None, module, "pooler")


def _embedding_site(model: Any) -> EmbeddingSite | None:
    """The table of ``model``, with the modules that its class ties to it."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        return None
    name = next(n for n, module in model.named_modules() if module is table)
    if type(table).forward is not nn.Embedding.forward:
        raise ValueError(
            f"target_modules must not hold 'embedding' for {type(model).__name__}: {name} is a "
            f"{type(table).__name__}, which does more than look up rows"
        )
    ties = type(model)._tied_weights_keys or {}
    targets = [
        target.removesuffix(".weight")
        for target, source in ties.items()
        if source == f"{name}.weight"
    ]
    views = tuple(n for n in targets if isinstance(model.get_submodule(n), nn.Embedding))
    head = next((n for n in targets if n not in views), None)
    # T5 draws its table with standard deviation 1 (times a factor), the others with their
    # initializer_range.
    std = getattr(
        model.config, "initializer_factor", getattr(model.config, "initializer_range", 1.0)
    )
    return EmbeddingSite(name, None, table, "embedding", views, head, float(std))


def _excluded(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _select(sites: list[AnySite], config: MPOEConfig) -> list[AnySite]:
    names = [site.name for site in sites]
    layers = config.layers_to_transform
    for option, fits in (("exclude_modules", _excluded), ("shape_pattern", pattern_matches)):
        for pattern in getattr(config, option):
            if not any(fits(pattern, name) for name in names):
                raise ValueError(
                    f"{option} names {pattern!r}, which is none of the {len(names)} "
                    f"targets{hint(pattern, names)}"
                )
    known = sorted({site.layer for site in sites if site.layer is not None})
    for index in layers or []:
        if index not in known:
            wanted = (
                f"layer indices {known[0]}..{known[-1]}"
                if known
                else "nothing: no target lies in a layer"
            )
            raise ValueError(f"layers_to_transform must hold {wanted}; got {index}")
    chosen = [
        site
        for site in sites
        if not any(_excluded(pattern, site.name) for pattern in config.exclude_modules)
        and (layers is None or site.layer is None or site.layer in layers)
    ]
    if not chosen:
        raise ValueError(
            "nothing is left to convert: layers_to_transform and exclude_modules leave out every "
            f"module; got layers_to_transform={layers}, exclude_modules={config.exclude_modules}"
        )
    return chosen


def find_sites(model: Any, config: MPOEConfig, family: Family | None = None) -> list[AnySite]:
    """Dense modules of ``model``, of this family or of the one that its configuration names, that
    ``config`` converts.

    Raises:
        ValueError: nothing to convert, ``exclude_modules``, ``shape_pattern`` or
            ``layers_to_transform`` that match nothing, an activation experts cannot compute, an
            embedding that scales its rows.
    """
    if family is None:
        given = getattr(model.config, "mpoe_sites", None)
        family = family_for(given, model.config.model_type.removeprefix(TYPE_PREFIX))
    sites: list[AnySite] = []
    if "ffn" in config.targets:
        sites += _ffn_sites(model, family)
    sites += _linear_sites(model, family, config)
    table = _embedding_site(model) if "embedding" in config.targets else None
    if table is not None:
        sites.append(table)
    if not sites:
        raise ValueError(
            f"{type(model).__name__} has no dense {' or '.join(config.targets)} modules to convert"
        )
    return [
        dataclasses.replace(site, keeps=settings.shape)
        if isinstance(site, FFNSite) and (settings := config.for_experts(site.name)).keeps_network
        else site
        for site in _select(sites, config)
    ]


def dense_networks(model: Any, config: MPOEConfig | None = None) -> list[FFNSite]:
    """The feed-forward networks of a dense model that ``config`` converts; default: all, with dense
    experts."""
    sites = find_sites(model, MPOEConfig(expert_type="dense") if config is None else config)
    return [site for site in sites if isinstance(site, FFNSite)]


def with_own_head(model: Any, like: Any = None) -> Any:
    """``model``, whose output projection has a weight of its own if that of ``like`` has:
    Transformers 5 constructs every T5 with a tied one, which a checkpoint's own (T5 v1.1, Flan)
    replaces."""
    head = model.get_output_embeddings()
    of_like = None if like is None else like.get_output_embeddings()
    tied = of_like is not None and of_like.weight is like.get_input_embeddings().weight
    if isinstance(head, nn.Linear) and not tied:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    return model


# fields of configurations that hold the hidden size of feed-forward networks
_FIELDS = ("d_ff", "n_inner", "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def hidden_size_as_mixture(dense: Any, config: MPOEConfig) -> int:
    """The hidden size at which ``dense`` has as many parameters as after its conversion with
    ``config``.

    Raises:
        ValueError: a model outside the table.
    """
    if dense.config.model_type not in TABLE:
        raise ValueError(
            f"a wider model must be of {', '.join(TABLE)}; got {dense.config.model_type}"
        )
    with torch.device("meta"):
        mixture = with_own_head(type(dense)(dense.config), dense)
    install_empty(mixture, find_sites(mixture, config), config)
    more = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in dense.parameters())
    sites = dense_networks(dense)
    rows = [
        site.weight(kind).shape[0 if kind != "down" else 1] for site in sites for kind in site.dense
    ]
    per_unit = sum(rows) + sum(
        site.bias(kind) is not None for site in sites for kind in site.dense if kind != "down"
    )
    return int(sites[0].weight("up").shape[1]) + round(more / per_unit)


@torch.no_grad()
def widened(dense: Any, hidden: int) -> Any:
    """A copy of a dense model with more hidden units that computes the same: the new units' output
    weights are 0.

    Their input weights are random, as large as the model's own.

    Args:
        dense: of a family in `mpoe.models.table`.
        hidden: the new hidden size of its feed-forward networks.
    """
    config = copy.deepcopy(dense.config)
    for name in _FIELDS:
        if hasattr(config, name):
            setattr(config, name, hidden)
    model = (
        with_own_head(type(dense)(config), dense)
        .to(dense.device, dense.dtype)
        .train(dense.training)
    )
    if hasattr(dense, "loss_type"):
        model.loss_type = dense.loss_type
    networks = list(zip(dense_networks(dense), dense_networks(model), strict=True))
    replaced = tuple(f"{prefix}." for old, _ in networks for prefix in old.prefixes.values())
    model.load_state_dict(
        {n: v for n, v in dense.state_dict().items() if not n.startswith(replaced)}, strict=False
    )
    for old, new in networks:
        for kind, module in new.dense.items():
            if kind == "down":
                torch.nn.init.zeros_(module.weight)  # type: ignore[arg-type]
            else:
                torch.nn.init.normal_(module.weight, std=float(old.weight(kind).std()))  # type: ignore[arg-type]
            if getattr(module, "bias", None) is not None:
                torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        for kind in new.dense:
            rows, columns = old.weight(kind).shape
            new.weight(kind)[:rows, :columns] = old.weight(kind)
            bias = new.bias(kind)
            kept = old.bias(kind)
            if bias is not None and kept is not None:
                bias[: len(kept)] = kept
    return model
