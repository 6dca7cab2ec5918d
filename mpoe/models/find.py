"""Which modules of a model a configuration converts: dense networks and matrices, and the experts of a mixture; and the
dense model with wider networks, the baseline of a mixture's size.

Nearly every mixture of Transformers 5 holds the weights of a layer's experts in two parameters, ``gate_up_proj
[E, 2F, I]`` and ``down_proj [E, I, F]``, and calls them with the router's choice: one adapter supports all of these.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpoe.config import MPOEConfig, RouterConfig
from mpoe.config.checks import hint
from mpoe.config.shapes import KINDS, pattern_matches
from mpoe.layers.drop_in import linear_weight
from mpoe.layers.experts import MixtureExperts, check_activation
from mpoe.models.sites import EmbeddingSite, FFNSite, LinearSite, ModuleSite, Report, install_empty
from mpoe.models.table import DENSE, FFN, TYPE_PREFIX, Family, family_for, name_pattern


def is_stock_experts(module: nn.Module) -> bool:
    """Whether ``module`` stores experts in the format of Transformers' mixtures."""
    held = [getattr(module, name, None) for name in ("gate_up_proj", "down_proj")]
    return all(isinstance(weight, nn.Parameter) and weight.dim() == 3 for weight in held)


def expert_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The experts of every layer of a mixture, by name: Transformers' own, or their replacements."""
    for name, module in model.named_modules():
        if is_stock_experts(module) or isinstance(module, MixtureExperts):
            yield name, module


def router_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The routers: sibling modules of the experts with a router's name."""
    for name, _ in expert_modules(model):
        block = model.get_submodule(name.rpartition(".")[0])
        yield from (child for key, child in block.named_children() if key in ("gate", "router"))


def _why_not(module: Any) -> str | None:
    """Why experts cannot become MPO experts; ``None`` if they can."""
    others = sorted({name for name, _ in module.named_parameters()} - {"gate_up_proj", "down_proj"})
    if others:
        return f"they also hold {', '.join(others)}"
    gate = getattr(type(module), "_apply_gate", None)
    if getattr(gate, "__name__", "") != "_default_apply_gate" or not getattr(module, "is_concatenated", True):
        return "they join gate and up in another way than act(gate) * up"
    experts, columns, rows = module.down_proj.shape[0], module.down_proj.shape[2], module.down_proj.shape[1]
    if getattr(module, "has_post_expert_norm", False) or module.gate_up_proj.shape != (experts, 2 * columns, rows):
        return (
            f"gate_up_proj must be [E, 2F, I] beside down_proj [E, I, F]; got {list(module.gate_up_proj.shape)} and "
            f"{list(module.down_proj.shape)}"
        )
    return None


@dataclass(frozen=True)
class ExpertsSite(ModuleSite):
    """The experts of one layer of a mixture, which become `MixtureExperts`.

    Attributes:
        options: keyword arguments of `MixtureExperts`.
    """

    options: dict[str, Any] = field(default_factory=dict)

    def weights(self, kind: str) -> Tensor:
        """Weights ``[E, in, out]`` of one kind of projection."""
        if kind == "down":
            return self.dense.down_proj.transpose(1, 2)
        gate, up = self.dense.gate_up_proj.chunk(2, 1)
        return (up if kind == "up" else gate).transpose(1, 2)

    def check(self, config: MPOEConfig) -> None:
        """Refuse experts of another structure, or mismatched shapes."""
        reason = _why_not(self.dense)
        if reason is not None:
            raise ValueError(f"{self.name}: existing_experts must be 'keep' for these experts; {reason}")
        own = config.for_experts(self.name)
        if own.keeps_network:
            raise ValueError(
                f"{self.name}: shape {own.shape!r} needs one dense projection for all experts; those of a mixture "
                "differ"
            )
        for kind in KINDS:
            try:
                own.shape_for(kind, *self.weights(kind).shape[1:])
            except ValueError as error:
                raise ValueError(f"{self.name}.{kind}: {error}") from error

    def build(self, config: MPOEConfig) -> MixtureExperts:
        """`MixtureExperts` of these sizes, whose weights the caller fills or initialises."""
        own, down = config.for_experts(self.name), self.dense.down_proj
        shapes = {kind: own.shape_for(kind, *self.weights(kind).shape[1:]) for kind in KINDS}
        options = {"device": "meta", "dtype": down.dtype, "backend": config.backend, **self.options}
        return MixtureExperts(shapes, down.shape[0], **options).to_empty(device=down.device)

    def load(self, module: MixtureExperts, config: MPOEConfig) -> Report:
        """Fit the experts, and return the error of the fit."""
        return {
            f"{self.name}.{kind}": cores.load_weights_(self.weights(kind))
            for kind, cores in module.projections().items()
        }


AnySite = FFNSite | LinearSite | EmbeddingSite | ExpertsSite


def expert_sites(model: Any) -> Iterator[ExpertsSite]:
    """The experts of every layer of a mixture that can be converted.

    Raises:
        ValueError: an activation that experts cannot compute.
    """
    for name, module in model.named_modules():
        if is_stock_experts(module):
            number = re.search(r"(?:^|\.)(\d+)\.", name)
            options = {
                "activation": check_activation(model.config.hidden_act),
                "init_std": dict.fromkeys(KINDS, model.config.initializer_range),
            }
            yield ExpertsSite(name, int(number[1]) if number else None, module, options)


def checked_for(model: nn.Module, family: Family, config: MPOEConfig) -> MPOEConfig:
    """``config`` for this model: a mixture determines experts and router itself, and its numbers are filled in.

    Raises:
        ValueError: ``existing_experts`` for a model without experts; for a mixture a different number of experts, a
            router, or another kind of experts.
    """
    if not family.is_mixture:
        if config.existing_experts != "keep":
            raise ValueError(
                f"existing_experts is for models that are mixtures already; {type(model).__name__} has no experts"
            )
        return config
    experts: Any = next((module for _, module in expert_modules(model)), None)
    if experts is None:
        raise ValueError(f"{type(model).__name__} must have layers with experts; this one has none")
    config = config.with_cores()
    default, number = MPOEConfig(shape=config.shape), int(experts.down_proj.shape[0])
    for name in ("moe_type", "num_experts", "expert_type", "router"):
        value = getattr(config, name)
        if value != getattr(default, name) and (name, value) != ("num_experts", number):
            raise ValueError(
                f"{name} must be left out for {type(model).__name__}, which has {number} experts and a router of its "
                f"own; got {value!r}"
            )
    chosen = getattr(getattr(model, "config", None), "num_experts_per_tok", 1)
    return dataclasses.replace(config, num_experts=number, router=RouterConfig(top_k=int(chosen)))


def stock_weights(experts: MixtureExperts) -> dict[str, nn.Parameter]:
    """The two parameters of Transformers' experts, computed from MPO experts."""
    weights = {kind: cores.dense_weights() for kind, cores in experts.projections().items()}
    joined = torch.cat([weights["gate_proj"], weights["up"]], -1).transpose(1, 2)
    values = {"gate_up_proj": joined, "down_proj": weights["down"].transpose(1, 2)}
    return {name: nn.Parameter(value.contiguous()) for name, value in values.items()}


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
        found = ((ffn, match) for ffn, pattern in patterns if (match := pattern.match(name)) is not None)
        ffn, match, dense = next(
            ((ffn, m, parts) for ffn, m in found if (parts := _dense_parts(holder, ffn))), (None,) * 3
        )
        if ffn is None or match is None or dense is None:
            continue
        if getattr(dense.get("gate_proj"), "bias", None) is not None:
            raise ValueError(f"{name}.{ffn.kinds()['gate_proj']} must have no bias: the gates of experts have none")
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
            columns={kind: slice(place * width, (place + 1) * width) for place, kind in enumerate(ffn.fused)},
            emptied=tuple(f"{name}.{part}" for part in ffn.emptied),
            zeroed=tuple((name, attribute) for attribute in ffn.zeroed if hasattr(holder, attribute)),
            sums=f"{name}.{ffn.sums}" if ffn.sums else "",
        )


def _linear_sites(model: nn.Module, family: Family, config: MPOEConfig) -> Iterator[LinearSite]:
    attention = [name_pattern(glob) for glob in family.attention if "attention" in config.targets]
    pooler = name_pattern(family.pooler) if "pooler" in config.targets and family.pooler is not None else None
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
            f"target_modules must not hold 'embedding' for {type(model).__name__}: {name} is a {type(table).__name__}, "
            "which does more than look up rows"
        )
    ties = type(model)._tied_weights_keys or {}
    targets = [target.removesuffix(".weight") for target, source in ties.items() if source == f"{name}.weight"]
    views = tuple(n for n in targets if isinstance(model.get_submodule(n), nn.Embedding))
    head = next((n for n in targets if n not in views), None)
    # T5 draws its table with standard deviation 1 (times a factor), the others with their initializer_range.
    std = getattr(model.config, "initializer_factor", getattr(model.config, "initializer_range", 1.0))
    return EmbeddingSite(name, None, table, "embedding", views, head, float(std))


def _excluded(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _select(sites: list[AnySite], config: MPOEConfig) -> list[AnySite]:
    names, layers = [site.name for site in sites], config.layers_to_transform
    for option, fits in (("exclude_modules", _excluded), ("shape_pattern", pattern_matches)):
        for pattern in getattr(config, option):
            if not any(fits(pattern, name) for name in names):
                raise ValueError(
                    f"{option} names {pattern!r}, which is none of the {len(names)} targets{hint(pattern, names)}"
                )
    known = sorted({site.layer for site in sites if site.layer is not None})
    for index in layers or []:
        if index not in known:
            wanted = f"layer indices {known[0]}..{known[-1]}" if known else "nothing: no target lies in a layer"
            raise ValueError(f"layers_to_transform must hold {wanted}; got {index}")
    chosen = [
        site
        for site in sites
        if not any(_excluded(pattern, site.name) for pattern in config.exclude_modules)
        and (layers is None or site.layer is None or site.layer in layers)
    ]
    if not chosen:
        raise ValueError(
            "nothing is left to convert: layers_to_transform and exclude_modules leave out every module; got "
            f"layers_to_transform={layers}, exclude_modules={config.exclude_modules}"
        )
    return chosen


def find_sites(model: Any, config: MPOEConfig, family: Family | None = None) -> list[AnySite]:
    """Dense modules of ``model``, of this family or of the one that its configuration names, that ``config`` converts;
    none if a mixture only keeps its experts.

    Raises:
        ValueError: nothing to convert, ``exclude_modules``, ``shape_pattern`` or ``layers_to_transform`` that match
            nothing, an activation experts cannot compute, an embedding that scales its rows.
    """
    if family is None:
        given = getattr(model.config, "mpoe_sites", None)
        family = family_for(given, model.config.model_type.removeprefix(TYPE_PREFIX))
    keeps_experts = family.is_mixture and config.existing_experts == "keep" and "ffn" in config.targets
    sites: list[AnySite] = []
    if "ffn" in config.targets and not keeps_experts:
        sites += expert_sites(model) if family.is_mixture else _ffn_sites(model, family)
    sites += _linear_sites(model, family, config)
    table = _embedding_site(model) if "embedding" in config.targets else None
    if table is not None:
        sites.append(table)
    if not sites and keeps_experts:
        return []
    if not sites:
        raise ValueError(f"{type(model).__name__} has no dense {' or '.join(config.targets)} modules to convert")
    return [
        dataclasses.replace(site, keeps=own.shape)
        if isinstance(site, FFNSite) and (own := config.for_experts(site.name)).keeps_network
        else site
        for site in _select(sites, config)
    ]


def dense_networks(model: Any, config: MPOEConfig | None = None) -> list[FFNSite]:
    """The feed-forward networks of a dense model that ``config`` converts; default: all, with dense experts."""
    found = find_sites(model, MPOEConfig(expert_type="dense") if config is None else config)
    return [site for site in found if isinstance(site, FFNSite)]


# fields of configurations that hold the hidden size of feed-forward networks
_FIELDS = ("d_ff", "n_inner", "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim")


def hidden_size_as_mixture(dense: Any, config: MPOEConfig) -> int:
    """The hidden size at which ``dense`` has as many parameters as after its conversion with ``config``.

    Raises:
        ValueError: a model outside the table of dense families.
    """
    if dense.config.model_type not in DENSE:
        raise ValueError(f"a wider model must be of {', '.join(DENSE)}; got {dense.config.model_type}")
    with torch.device("meta"):
        mixture = type(dense)(dense.config)
    install_empty(mixture, find_sites(mixture, config), config)
    more = sum(p.numel() for p in mixture.parameters()) - sum(p.numel() for p in dense.parameters())
    sites = dense_networks(dense)
    rows = [site.weight(kind).shape[0 if kind != "down" else 1] for site in sites for kind in site.dense]
    per_unit = sum(rows) + sum(site.bias(kind) is not None for site in sites for kind in site.dense if kind != "down")
    return int(sites[0].weight("up").shape[1]) + round(more / per_unit)


@torch.no_grad()
def widened(dense: Any, hidden: int) -> Any:
    """A copy of a dense model with more hidden units that computes the same: the new units' output weights are 0.

    Their input weights are random, as large as the model's own.

    Args:
        dense: of a family in `mpoe.models.table` without experts.
        hidden: the new hidden size of its feed-forward networks.
    """
    config = copy.deepcopy(dense.config)
    for name in _FIELDS:
        if hasattr(config, name):
            setattr(config, name, hidden)
    model = type(dense)(config).to(dense.device, dense.dtype).train(dense.training)
    if hasattr(dense, "loss_type"):
        model.loss_type = dense.loss_type
    networks = list(zip(dense_networks(dense), dense_networks(model), strict=True))
    own = tuple(f"{prefix}." for old, _ in networks for prefix in old.prefixes.values())
    model.load_state_dict({n: v for n, v in dense.state_dict().items() if not n.startswith(own)}, strict=False)
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
            bias, kept = new.bias(kind), old.bias(kind)
            if bias is not None and kept is not None:
                bias[: len(kept)] = kept
    return model
