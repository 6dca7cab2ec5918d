"""Which modules a configuration converts; the dense model with wider networks, the baseline of
equal size."""

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
from mpoe.models.table import TABLE, TYPE_PREFIX, Family, family_for, name_pattern

AnySite = FFNSite | LinearSite | EmbeddingSite


def _ffn_sites(model: Any, family: Family) -> Iterator[FFNSite]:
    patterns = [(ffn, name_pattern(ffn.holder)) for ffn in family.ffn]
    up_std, down_std = family.init_std(model.config)
    # A projection that several networks share has a name in each.
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, holder in model.named_modules():
        for ffn, pattern in patterns:
            match = pattern.match(name)
            prefixes = {kind: f"{name}.{part}" for kind, part in ffn.kinds().items()}
            if match is not None and modules.keys() >= set(prefixes.values()):
                break
        else:  # another structure
            continue
        for field, parts in (("place", [ffn.place]), ("emptied", ffn.emptied)):
            for part in filter(None, parts):
                if f"{name}.{part}" not in modules:
                    raise ValueError(f"sites[{field!r}] names {part!r}, which {name} does not hold")
        dense = {kind: modules[prefix] for kind, prefix in prefixes.items()}
        if getattr(dense.get("gate_proj"), "bias", None) is not None:
            raise ValueError(
                f"{prefixes['gate_proj']} must have no bias: the gates of experts have none"
            )
        width = linear_weight(dense["up"]).shape[1] // max(len(ffn.fused), 1)
        settings = ffn.settings(model.config)
        check_activation(settings["activation"])
        yield FFNSite(
            name=f"{name}.{ffn.place}" if ffn.place else name,
            stream=ffn.stream,
            layer=int(match["layer"]),
            dense=dense,
            prefixes=prefixes,
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
    globs = {"attention": family.attention, "pooler": [family.pooler] if family.pooler else []}
    patterns = [
        (component, name_pattern(glob))
        for component in config.targets
        for glob in globs.get(component, ())
    ]
    for name, module in model.named_modules():
        for component, pattern in patterns:
            if match := pattern.match(name):
                layer = match.groupdict().get("layer")
                yield LinearSite(name, None if layer is None else int(layer), module, component)
                break


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
    ties = (type(model)._tied_weights_keys or {}).items()
    targets = [key.removesuffix(".weight") for key, source in ties if source == f"{name}.weight"]
    views = tuple(n for n in targets if isinstance(model.get_submodule(n), nn.Embedding))
    head = next((n for n in targets if n not in views), None)
    # T5 draws its table with standard deviation 1 (times a factor), the others with their
    # initializer_range.
    std = getattr(model.config, "initializer_range", 1.0)
    std = float(getattr(model.config, "initializer_factor", std))
    return EmbeddingSite(name, None, table, "embedding", views, head, std)


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
            wanted = "nothing: no target lies in a layer"
            if known:
                wanted = f"layer indices {known[0]}..{known[-1]}"
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
    chosen = _select(sites, config)
    for place, site in enumerate(chosen):
        settings = config.for_experts(site.name) if isinstance(site, FFNSite) else None
        if settings is not None and settings.keeps_network:
            chosen[place] = dataclasses.replace(site, keeps=settings.shape)
    return chosen


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
    hidden = int(dense_networks(dense)[0].weight("up").shape[1])
    with torch.device("meta"):
        mixture = with_own_head(type(dense)(dense.config), dense)
        size = _resized(dense, hidden).num_parameters()
        per_unit = _resized(dense, hidden + 1).num_parameters() - size
    install_empty(mixture, find_sites(mixture, config), config)
    return hidden + round((mixture.num_parameters() - size) / per_unit)


def _resized(dense: Any, hidden: int) -> Any:
    """A new model like ``dense`` whose feed-forward networks have this hidden size."""
    config = copy.deepcopy(dense.config)
    for name in _FIELDS:
        if hasattr(config, name):
            setattr(config, name, hidden)
    return with_own_head(type(dense)(config), dense)


@torch.no_grad()
def widened(dense: Any, hidden: int) -> Any:
    """A copy of a dense model with more hidden units that computes the same: the new units' output
    weights are 0.

    Their input weights are random, as large as the model's own.

    Args:
        dense: of a family in `mpoe.models.table`.
        hidden: the new hidden size of its feed-forward networks.
    """
    model = _resized(dense, hidden).to(dense.device, dense.dtype)
    model.train(dense.training)
    if hasattr(dense, "loss_type"):
        model.loss_type = dense.loss_type
    networks = list(zip(dense_networks(dense), dense_networks(model), strict=True))
    replaced = tuple(f"{prefix}." for old, _ in networks for prefix in old.prefixes.values())
    model.load_state_dict(
        {n: v for n, v in dense.state_dict().items() if not n.startswith(replaced)}, strict=False
    )
    for old, new in networks:
        for kind in new.dense:
            kept = old.weight(kind)
            weight = new.weight(kind)
            if kind == "down":
                weight.zero_()
            else:
                weight.normal_(std=float(kept.std()))
            weight[: kept.shape[0], : kept.shape[1]] = kept
            bias = new.bias(kind)
            kept_bias = old.bias(kind)
            if bias is not None and kept_bias is not None:
                bias.zero_()
                bias[: len(kept_bias)] = kept_bias
    return model
