"""An expert is a file: hidden neurons that were trained beside a frozen dense model, to be merged
or composed later.

The file is one of safetensors. Its tensors are ``weights.LAYER.up`` (``gate_proj``, ``down``: ``[m,
I]``; ``bias``: ``[m]``) and ``statistics.LAYER.*`` (see `mpoe.models.composition`); its metadata
hold a JSON object, `Expert.facts`, and the SHA-256 of both.
"""

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpoe.config import MPOEConfig
from mpoe.config.checks import check_type, is_file_name, refusing
from mpoe.layers.neurons import NeuronExperts
from mpoe.models.base import MPOEModelMixin
from mpoe.models.card import base_name
from mpoe.models.composition import Statistics, check_statistics
from mpoe.models.convert import check_finite, convert_to_mpoe, converted_class
from mpoe.models.find import dense_networks, widened
from mpoe.models.sites import FFNSite
from mpoe.models.walk import neuron_modules
from mpoe.models.weight_files import (
    Tensors,
    check_links,
    first_line,
    read_with_metadata,
    tensors_hash,
    write_tensors,
)
from mpoe_kernels.version import __version__

FORMAT = 1
MOST_LETTERS, MOST_LEVELS = 1 << 20, 64  # of facts as JSON
LARGEST_WEIGHT = 1e6
_HASH = '"[0-9a-f]{64}"'
_WORD = r'"[\w./+-]{0,200}"'
# Facts -> regular expressions of their JSON; older files lack some.
_FACTS = {
    "base": _HASH,
    "base_name": _WORD,
    "model": _WORD,
    "tokenizer": f"null|{_HASH}",
    "neurons": r"[1-9]\d{0,8}",
    "version": f"null|{_WORD}",
    "activation": f"null|{_WORD}",
    "gated": "null|true|false",
    "training": r"\{.*\}",
}
_CARD = """---
library_name: mpoe
tags: [mpoe, mixture-of-experts]
---
# Experts

Each file is an expert: hidden neurons that were trained beside a frozen base model. `mpoe compose
BASE FILE ...` makes a mixture of several, without their texts; `mpoe info FILE` says what a file
needs.

| file | base | neurons per layer | SHA-256 of the base |
|---|---|---|---|
{rows}

Loss on held-out text of the domain, nats per token; *quiet* is the expert composed with *none*, as
`mpoe compose` does; kept is its part of the expert's gain. Of the base's own answers: the KL
divergence from the base to the quiet expert, nats per token, and how often the most probable token
is the base's.

| file | base | expert, always on | quiet | kept | own answers | equal |
|---|---|---|---|---|---|---|
{changes}
"""
WAYS = ("base", "expert, always on", "quiet expert")  # whose losses an expert's file has
_PARTS = ("experts", "router")  # modules of a layer that the dense model does not have


@dataclass(frozen=True)
class Expert:
    """An expert by itself.

    Attributes:
        facts: ``format``, ``version``, ``name`` (the file's), ``base`` and ``tokenizer`` (SHA-256
            of the base's weights and of the vocabulary, or ``None``), ``base_name`` (on the hub),
            ``model``, ``neurons``, ``activation``, ``gated``, ``training``.
        weights: ``LAYER.up``, ``gate_proj``, ``down``: ``[m, I]``; ``bias``: ``[m]``.
        statistics: see `mpoe.models.composition`; empty if there are none.
    """

    facts: dict[str, Any]
    weights: Tensors
    statistics: Tensors

    @property
    def name(self) -> str:
        return str(self.facts["name"])

    @property
    def neurons(self) -> int:
        """m."""
        return int(self.facts["neurons"])


def base_identity(model: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights of a dense model, or of the one
    inside a mixture of neurons."""
    prefixes = tuple(f"{layer}.{part}." for layer in neuron_modules(model) for part in _PARTS)
    return tensors_hash(
        {name: value for name, value in model.state_dict().items() if not name.startswith(prefixes)}
    )


def vocabulary_identity(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary.

    Raises:
        TypeError: what has no ``get_vocab``.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(
            f"tokenizer must be a tokenizer of Transformers; got {type(tokenizer).__name__}"
        )
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _values(experts: NeuronExperts) -> Tensors:
    return {name: parameter.detach()[0] for name, parameter in experts.named_parameters()}


def places_for_neurons(model: Any) -> list[FFNSite]:
    """The feed-forward networks of a dense model, beside which neurons can stand."""
    return dense_networks(model, MPOEConfig(moe_type="none", shape="neurons"))


def experts_of(base: Any, experts: Iterable) -> list[Expert]:
    """Experts, or those in files, that were trained beside a dense model.

    Raises:
        TypeError, ValueError: as `load_expert`; a base that is no known dense model or not finite;
            an expert of another base, or with weights of other names or shapes.
    """
    loaded = [expert if isinstance(expert, Expert) else load_expert(expert) for expert in experts]
    converted_class(base)
    check_finite(base)
    identity = base_identity(base)
    networks = places_for_neurons(base)
    for expert in loaded:
        if expert.facts["base"] != identity:
            raise ValueError(
                f"expert {expert.name!r} must be of this base; it was trained beside a "
                f"{expert.facts['model']} ({expert.facts['base_name'] or 'local'}), whose weights "
                f"are not bit for bit those of this {type(base).__name__} in {base.dtype}"
            )
        wanted: dict[str, tuple[int, ...]] = {}
        for site in networks:
            for kind in site.dense:
                wanted[f"{site.place}.{kind}"] = (expert.neurons, site.weight("up").shape[0])
            if site.bias("up") is not None:
                wanted[f"{site.place}.bias"] = (expert.neurons,)
        shapes = {name: tuple(value.shape) for name, value in expert.weights.items()}
        for name in sorted({*shapes, *wanted}):
            if shapes.get(name) != wanted.get(name):
                raise ValueError(
                    f"expert {expert.name!r} must have {name} {wanted.get(name)}; it has "
                    f"{shapes.get(name)}"
                )
    return loaded


@torch.no_grad()
def start_expert(
    model: Any, neurons: int = 64, *, expert: Any = None, inplace: bool = False
) -> Any:
    """Put one expert beside every feed-forward network of a dense model; only it trains.

    Everything else is frozen, so that any training loop (an unmodified ``Trainer``, weight decay
    included) leaves it as it is, bit for bit. There is no router: the expert adds to every token.

    Args:
        model: of a dense family in `mpoe.models.table` (networks that are a module, or BERT's).
        neurons: the expert's hidden neurons per network, m: copies of random dense ones that
            contribute nothing yet.
        expert: an `Expert` or its file, to continue from; its size counts then, not ``neurons``.
        inplace: change ``model`` itself instead of a copy.

    Raises:
        TypeError, ValueError: as `convert_to_mpoe` and `load_expert`; an expert of another base.
    """
    if expert is not None:
        (expert,) = experts_of(model, [expert])
        neurons = expert.neurons
    started = convert_to_mpoe(
        model, MPOEConfig(moe_type="none", shape="neurons", neurons=neurons), inplace=inplace
    )
    started.requires_grad_(False)
    for layer, module in neuron_modules(started).items():
        module.experts.requires_grad_(True)
        if expert is not None:
            for part, value in _values(module.experts).items():
                value.copy_(expert.weights[f"{layer}.{part}"])
    return started


def made_expert(
    model: Any,
    name: str,
    statistics: Statistics | None = None,
    tokenizer: Any = None,
    training: Mapping[str, Any] | None = None,
) -> Expert:
    """The expert of a model under a name; arguments and errors as those of `save_expert`."""
    layers = neuron_modules(model) if isinstance(model, MPOEModelMixin) else {}
    if not layers or any(
        layer.router is not None or layer.experts.latent is not None for layer in layers.values()
    ):
        raise TypeError(
            f"model must have one expert (see start_expert); this {type(model).__name__} does not"
        )
    check_type("training", training, Mapping | None, "a mapping of facts")
    if statistics is not None:
        sizes = {name: layer.in_features for name, layer in layers.items()}
        check_statistics(statistics, sizes, "statistics")
    check_finite(model)
    first = next(iter(layers.values())).experts
    facts = {
        "format": FORMAT,
        "version": __version__,
        "name": name,
        "base": base_identity(model),
        "base_name": base_name(model),
        "model": model.dense_class.__name__,
        "tokenizer": None if tokenizer is None else vocabulary_identity(tokenizer),
        "neurons": first.neurons,
        "activation": first.activation,
        "gated": first.gate_proj is not None,
        "training": dict(training or {}),
    }
    weights = {
        f"{place}.{part}": v
        for place, layer in layers.items()
        for part, v in _values(layer.experts).items()
    }
    expert = Expert(facts, weights, dict(statistics or {}))
    _check(expert)
    return expert


def save_expert(
    model: Any,
    path: str | Path,
    *,
    statistics: Statistics | None = None,
    tokenizer: Any = None,
    training: Mapping[str, Any] | None = None,
) -> Expert:
    """Write the expert of a model, without the model, to one file.

    Args:
        model: from `start_expert`.
        path: of the file, e.g. ``law.expert``; its name is the expert's. An existing file is
            replaced.
        statistics: from `collect_statistics`; without them an expert can be merged but not
            composed.
        tokenizer: its vocabulary is noted, and `compose_experts` refuses experts of different ones.
        training: facts to keep with it, for JSON: data, steps, rates, losses.

    Raises:
        TypeError: a model without such an expert, a path or ``training`` of another type.
        ValueError: weights or statistics with NaN, statistics of another model, a path that cannot
            be a file.
    """
    check_type("path", path, (str, os.PathLike), "the path of a file")
    file = Path(path)
    if not file.name or not file.parent.is_dir() or (file.exists() and not file.is_file()):
        raise ValueError(f"path must be of a file in a folder that is there; got {str(path)!r}")
    expert = made_expert(model, file.stem, statistics, tokenizer, training)
    write_expert(expert, file)
    return expert


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256((text + tensors_hash(tensors)).encode()).hexdigest()


def write_expert(expert: Expert, file: Path) -> None:
    """Write a file as a whole or not at all."""
    try:
        text = json.dumps(expert.facts, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"training must hold what JSON can; {error}") from error
    _read_facts(text, file)
    tensors = {
        f"{kind}.{name}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for kind in ("weights", "statistics")
        for name, value in getattr(expert, kind).items()
    }
    write_tensors(file, tensors, {"expert": text, "sha256": _checksum(text, tensors)})


def load_expert(path: str | Path) -> Expert:
    """Read an expert's file.

    Raises:
        TypeError: a path of another type.
        ValueError: no file, one that is damaged or not an expert's, of a newer format, without
            facts, or with NaN.
    """
    check_type("path", path, (str, os.PathLike), "an expert's file")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"path must be an expert's file; {str(path)!r} is no file")
    check_name(file.stem)
    tensors, metadata = read_with_metadata(file)
    if "expert" not in metadata:
        raise ValueError(
            f"path must be an expert's file (see save_expert); {file} is another safetensors file"
        )
    if metadata.get("sha256") != _checksum(metadata["expert"], tensors):
        raise ValueError(f"{file} is damaged: its contents have another SHA-256 than it says")
    facts = _read_facts(metadata["expert"], file)
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(
            f"{file} must be of format {FORMAT}; got {metadata['expert'][:60]} (of a newer mpoe?)"
        )
    parts: dict[str, Tensors] = {"weights": {}, "statistics": {}}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind not in parts:
            raise ValueError(f"{file} must hold weights and statistics; got {name!r}")
        parts[kind][rest] = value
    expert = Expert({"tokenizer": None, "training": {}, **facts, "name": file.stem}, **parts)
    _check(expert)
    return expert


def _read_facts(text: str, file: Path) -> Any:
    """Facts from JSON, if that is neither large nor nested deeply, of finite numbers and text
    (ValueError)."""
    levels = itertools.accumulate((letter in "[{") - (letter in "]}") for letter in text)
    wanted = f"JSON of at most {MOST_LETTERS} letters in {MOST_LEVELS} levels"
    with refusing(f"{file} must hold facts as {wanted}; ", ValueError):
        if len(text) > MOST_LETTERS or max(levels, default=0) > MOST_LEVELS:
            raise ValueError(f"it has {len(text)} letters or is nested deeper")
        facts = json.loads(text)
        json.dumps(facts, allow_nan=False, ensure_ascii=False).encode()
    return facts


def check_name(name: str) -> None:
    """Refuse what cannot be the name of an expert's file (ValueError)."""
    if not is_file_name(name):
        raise ValueError(
            f"an expert must have the name of a file, of letters, digits and the like; got {name!r}"
        )


def _check(expert: Expert) -> None:
    """Refuse an expert whose facts, weights or statistics are not of the kinds that are written
    (ValueError)."""
    whose = f"expert {expert.facts['name']!r}"
    check_name(expert.name)
    for name, pattern in _FACTS.items():
        text = json.dumps(expert.facts.get(name), default=str)
        if re.fullmatch(pattern, text, re.DOTALL) is None:
            raise ValueError(f"{whose} must hold {name} as {pattern}; got {text[:80]}")
    for name, value in expert.weights.items():
        fits = value.dim() in (1, 2) and len(value) == expert.neurons
        if not fits or not value.is_floating_point():
            raise ValueError(
                f"{whose} must hold {name} as floating-point numbers of {expert.neurons} neurons; "
                f"got {value.dtype} {list(value.shape)}"
            )
        # in half precision, the bound would be infinite
        if not bool((value.double().abs() <= LARGEST_WEIGHT).all()):
            raise ValueError(
                f"{whose} must have finite weights of at most {LARGEST_WEIGHT:g}; NaN, Inf or more "
                f"in {name}"
            )
    if expert.statistics:
        sizes = layer_sizes(expert.weights)
        check_statistics(expert.statistics, sizes, f"the statistics of {whose}")


def layer_sizes(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Input features by layer, from an expert's weights."""
    return {
        name.rpartition(".")[0]: value.shape[1]
        for name, value in weights.items()
        if value.dim() == 2
    }


@torch.no_grad()
def merge_expert(model: Any, expert: Any, *, weight: float = 1.0) -> Any:
    """A dense model of the same class with F + m hidden neurons that computes what ``model`` and
    the expert do.

    Args:
        model: the expert's base; it is not changed.
        expert: an `Expert`, its file, or a list of several, whose neurons then all add to every
            token.
        weight: factor of what they add, such as one over their number.

    Raises:
        TypeError, ValueError: as `load_expert`; no expert, a model outside the table of dense
            families, or of another base, a weight that is no finite number.
    """
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight):
        raise ValueError(f"weight must be a finite number; got {weight!r}")
    added = experts_of(model, expert if isinstance(expert, (list, tuple)) else [expert])
    if not added:
        raise ValueError("expert must be at least one; got an empty list")
    hidden = places_for_neurons(model)[0].weight("up").shape[1]
    merged = widened(model, hidden + sum(part.neurons for part in added))
    for site in places_for_neurons(merged):
        for kind in site.dense:
            rows = torch.cat([part.weights[f"{site.place}.{kind}"] for part in added])
            if kind == "down":
                site.weight(kind)[hidden:] = rows * weight
            else:
                site.weight(kind)[:, hidden:] = rows.t()
        bias = site.bias("up")
        if bias is not None:
            bias[hidden:] = torch.cat([part.weights[f"{site.place}.bias"] for part in added])
    if merged.can_generate():
        merged.generation_config = model.generation_config
    return merged


def kept(losses: Mapping[str, Any]) -> float | None:
    """The share of an expert's own gain that is left when it is quiet, of the losses in its
    file; ``None`` if the file says nothing, or the expert gained nothing."""
    known = [loss for way in WAYS if isinstance(loss := losses.get(way), float)]
    if len(known) < len(WAYS) or known[1] >= known[0]:
        return None
    base, alone, quiet = known
    return (base - quiet) / (base - alone)


def _changes_row(name: str, training: Mapping) -> str:
    """What an expert keeps and changes, as a row of the card; a dash where its file says
    nothing."""

    measured: dict[str, dict] = {}
    for fact in ("held_out", "answers", "same"):
        values = training.get(fact)
        measured[fact] = values if isinstance(values, dict) else {}
    losses = measured["held_out"]
    numbers = [(losses.get(way), ".3f") for way in WAYS]
    numbers.append((kept(losses), ".0%"))
    numbers.append((measured["answers"].get(WAYS[-1]), ".4f"))
    numbers.append((measured["same"].get(WAYS[-1]), ".1%"))
    cells = [name]
    for number, how in numbers:
        cells.append(format(number, how) if isinstance(number, float) else "-")
    return f"| {' | '.join(cells)} |"


def expert_repository(path: str | Path) -> dict[str, Path | bytes]:
    """What a repository of an expert's file, or of all files ``*.expert`` of a folder, holds: the
    files and a card, by name.

    Raises:
        TypeError, ValueError: as `load_expert`; a folder without experts.
    """
    place = Path(path)
    files = sorted(place.glob("*.expert")) if place.is_dir() else [place]
    if not files:
        raise ValueError(
            f"path must be an expert's file or a folder with some; {place} holds no *.expert"
        )
    check_links(place)
    rows = []
    changes = []
    for file, expert in ((file, load_expert(file)) for file in files):
        base = expert.facts["base_name"] or expert.facts["model"]
        rows.append(f"| {file.name} | {base} | {expert.neurons} | `{expert.facts['base'][:16]}` |")
        changes.append(_changes_row(file.name, expert.facts["training"]))
    contents: dict[str, Path | bytes] = {file.name: file for file in files}
    card = _CARD.format(rows="\n".join(rows), changes="\n".join(changes))
    contents["README.md"] = card.encode()
    return contents


def push_expert(
    path: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Upload an expert's file, or all files ``*.expert`` of a folder, in one commit with a card.

    Args:
        path: of the file or the folder; nothing else of the folder is uploaded.
        repo_id: such as ``"me/experts"``; made if it is not there.
        private, token: as in `huggingface_hub.HfApi.create_repo`.

    Returns:
        The address of the commit.

    Raises:
        TypeError, ValueError: as `load_expert`, before anything is uploaded; a folder without
            experts.
        OSError: the hub could not be reached, or refused, or no repository can have that name.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    contents = expert_repository(path)
    api: Any = HfApi(token=token)
    operations = [CommitOperationAdd(name, value) for name, value in contents.items()]
    names = [name.removesuffix(".expert") for name in contents if name.endswith(".expert")]
    message = f"Experts {', '.join(names)}"
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.create_commit(repository, operations, commit_message=message).commit_url)
    except Exception as error:  # of the connection, the hub, or its library's file readers
        raise OSError(
            f"repository {repo_id!r} could not be written: {first_line(error)}"
        ) from error
