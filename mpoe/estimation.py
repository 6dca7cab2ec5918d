"""What a converted model would cost, from its configuration alone: parameters, FLOPs and memory of every feed-forward
layer with MPO experts, with dense experts, and as it is. The model is built on the meta device, without memory.

All numbers are exact and follow from shapes:

* parameters: MPO experts share one central core, ``central + E * auxiliary`` per matrix; dense experts ``E * I * F``;
  dense ``I * F``; both mixtures add a router ``[I, E]``. Biases shared by experts count as the rest of the model.
* FLOPs: those of the contractions that `mpoe_kernels.plan_contraction` ranks first for MPO experts, ``2 N I F`` for the
  others (N = T * K rows; dense: T), three times that with the backward pass; a router ``2 T I E``.
* around hidden-side experts the projections are dense, and every expert owns a block per projection; beside neurons the
  network is dense, and every expert owns rows of each projection. With the backward pass, which recomputes the input of
  the activation, what an expert owns takes part in four products of up and gate_proj and in three of down.

Tokens are those of one device in a step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from mpoe.config import MPOEConfig
from mpoe.config.checks import hint
from mpoe.config.shapes import KINDS
from mpoe.data.mappings import read_mapping
from mpoe.layers.drop_in import linear_weight
from mpoe.models.classes import default_class, dense_names
from mpoe.models.find import dense_networks
from mpoe.models.sites import FFNSite
from mpoe.models.table import CLASS_PREFIX, SEQ2SEQ, TABLE, TYPE_PREFIX, known_type
from mpoe_kernels import plan_contraction

STATE_BYTES = 16  # of a trained parameter: itself, its gradient and AdamW's two moments, in float32
DESIGNS = ("mpoe", "switch", "dense")

# ------------------------------------------------------------- the dense model

# Sizes of well-known models, so that they can be planned without network or weights: those of the models' published
# configurations; everything else is the default of the model's Hugging Face configuration class.


def _t5(d_model: int, d_ff: int, num_layers: int, num_heads: int, **more: Any) -> dict[str, Any]:
    """Raffel et al., JMLR 2020, section 3.2 and 3.7: ReLU, embeddings tied to the head."""
    sizes = {"d_model": d_model, "d_ff": d_ff, "d_kv": 64, "num_layers": num_layers, "num_heads": num_heads}
    return {"model_type": "t5", "vocab_size": 32128, **sizes, **more}


def _gpt2(n_embd: int, n_layer: int, n_head: int) -> dict[str, Any]:
    """Radford et al. 2019, table 2."""
    return {"model_type": "gpt2", "n_embd": n_embd, "n_layer": n_layer, "n_head": n_head}


def _bert(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 30522) -> dict[str, Any]:
    """Devlin et al., NAACL 2019, section 3."""
    sizes = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_hidden_layers": num_layers}
    return {"model_type": "bert", "vocab_size": vocab_size, "num_attention_heads": num_heads, **sizes}


_V1_1 = {"small": (512, 1024, 8, 6), "base": (768, 2048, 12, 12), "large": (1024, 2816, 24, 16)}
_V1_1 |= {"xl": (2048, 5120, 24, 32), "xxl": (4096, 10240, 24, 64)}
_GATED: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # of T5 v1.1 and Flan
KNOWN_SIZES: dict[str, dict[str, Any]] = {
    "t5-small": _t5(512, 2048, 6, 8),
    "t5-base": _t5(768, 3072, 12, 12),
    "t5-large": _t5(1024, 4096, 24, 16),
    "t5-3b": _t5(1024, 16384, 24, 32, d_kv=128),
    "t5-11b": _t5(1024, 65536, 24, 128, d_kv=128),
    **{f"{kind}-{name}": _t5(*sizes, **_GATED) for kind in ("t5-v1_1", "flan-t5") for name, sizes in _V1_1.items()},
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "bert-base-cased": _bert(768, 12, 12, 28996),
    "bert-large-cased": _bert(1024, 24, 16, 28996),
    **{f"bert-base{case}": _bert(768, 12, 12) for case in ("", "-uncased")},
    **{f"bert-large{case}": _bert(1024, 24, 16) for case in ("", "-uncased")},
}
# Hub organisations whose models of these names are exactly these sizes.
ORGANISATIONS = ("", "google", "google-t5", "google-bert", "openai-community")


def read_values(name: str) -> tuple[dict[str, Any], str]:
    """Configuration values of a model and where they came from; the network is never used.

    Args:
        name: a folder with a ``config.json``, a ``.json`` file, a well-known size (``t5-11b``,
            ``google/flan-t5-xl``) or a hub name in the local cache.

    Raises:
        ValueError: nothing of that name; the message suggests the closest known ones.
    """
    if not name:
        raise ValueError("model must be a folder, a config.json or a well-known size; got an empty name")
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise ValueError(f"model: {path} holds no config.json, so it is not a saved model")
    if file.is_file():
        return read_mapping(file, "configuration"), str(file)
    organisation, _, last = name.lower().rpartition("/")
    if organisation in ORGANISATIONS and last in KNOWN_SIZES:  # t5-base and google-t5/T5-Base name the same
        return dict(KNOWN_SIZES[last]), "published sizes"
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".json"):
        raise ValueError(f"model: no such file or folder: {name}")
    with contextlib.suppress(OSError, ValueError):
        values, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True)
        if values:
            return values, "the local hub cache"
    raise ValueError(
        f"model: {name!r} is not a folder or config.json here, not a well-known size "
        f"({', '.join(list(KNOWN_SIZES)[:5])}, ...) and not in the local hub cache{hint(last, [*KNOWN_SIZES])}"
    )


def _stream(name: str) -> str:
    """The stream of a module's tokens; cross-attention reads its keys and values from the encoder."""
    cross = (".EncDecAttention.k", ".EncDecAttention.v", ".encoder_attn.k_proj", ".encoder_attn.v_proj")
    if any(part in name for part in cross) or "encoder" in name.split("."):
        return "encoder"
    return "decoder"


def _head_of_its_own(model: Any, values: Mapping[str, Any]) -> int:
    """Elements of a language-model head that is untied in the configuration although the class ties it.

    Transformers 5 constructs every T5 with a tied head, which a checkpoint's own head (T5 v1.1, Flan) replaces.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if values.get("tie_word_embeddings", True) or head is None or head.weight is not embedding.weight:
        return 0
    return int(head.weight.numel())


@dataclass(frozen=True)
class Inventory:
    """The properties of a dense model that a plan needs.

    Attributes:
        name: the name that the user typed.
        source: where the sizes came from.
        class_name: Hugging Face class.
        parameters: of the dense model, tied ones counted once.
        sites: feed-forward networks that would be converted, without memory.
        rest: matrix maps that stay dense (attention projections, language-model head), as
            ``(stream, rows, columns) -> how many``. BERT's pooler, one row per sequence, is left out.
        mpoe: the configuration of an already converted model, or None.
    """

    name: str
    source: str
    class_name: str
    parameters: int
    sites: Sequence[FFNSite]
    rest: Mapping[tuple[str, int, int], int]
    mpoe: MPOEConfig | None

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(site.stream for site in self.sites))


def take_inventory(
    name: str, exclude_modules: list[str] | None = None, layers_to_transform: list[int] | None = None
) -> Inventory:
    """Read a model's layers from its configuration; nothing is allocated.

    Args:
        name: see `read_values`.
        exclude_modules, layers_to_transform: as in `MPOEConfig`.

    Raises:
        ValueError: no such model, an unknown family, a broken configuration, exclusions that match nothing.
    """
    values, source = read_values(name)
    family = known_type(name, values).removeprefix(TYPE_PREFIX)
    fields = {key: value for key, value in values.items() if key not in ("model_type", "mpoe", "architectures")}
    named = [str(each).removeprefix(CLASS_PREFIX) for each in values.get("architectures") or []]
    known = set(dense_names(family).values())
    class_name = next((each for each in named if each in known), default_class(family))
    try:
        config = AutoConfig.for_model(family, **fields)
    except Exception as error:  # configuration classes raise many types of errors
        raise ValueError(f"model: the configuration of {name!r} is not a valid {family} one: {error}") from error
    mpoe = None if values.get("mpoe") is None else MPOEConfig.from_dict(values["mpoe"])
    try:
        with torch.device("meta"):
            model: Any = getattr(transformers, class_name)(config)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise ValueError(f"model: the configuration of {name!r} builds no {class_name}: {error}") from error
    chosen = {"exclude_modules": exclude_modules or [], "layers_to_transform": layers_to_transform}
    sites = dense_networks(model, MPOEConfig(shape="separable", **chosen))  # type: ignore[arg-type]
    converted = {id(module) for site in sites for module in site.dense.values()}
    rest: Counter[tuple[str, int, int]] = Counter()
    for place, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in converted and "pooler" not in place:
            stream = _stream(place) if TABLE[family].style == SEQ2SEQ else "main"
            rest[(stream, *linear_weight(module).shape)] += 1
    parameters = sum(p.numel() for p in model.parameters()) + _head_of_its_own(model, values)
    return Inventory(name, source, class_name, parameters, sites, rest, mpoe)


# ------------------------------------------------------------- its costs


@dataclass(frozen=True)
class Usage:
    """The workload.

    Attributes:
        tokens: per stream (``encoder``, ``decoder`` or ``main``), tokens of one device in one step.
        dtype: of weights, activations and products.
        training: forward and backward, rather than forward.
        mask_central: the gradient mask is on: the central core gets no gradient in this step.
    """

    tokens: Mapping[str, int]
    dtype: torch.dtype
    training: bool
    mask_central: bool = False

    @property
    def passes(self) -> int:
        """Number of products of a dense linear in the step: the output and, in training, the two gradients."""
        return 3 if self.training else 1


@dataclass(frozen=True)
class Cost:
    """Additive costs of a part of the model: elements, FLOPs of a step, and the peak of weights that a product rebuilds
    (for a sum, the larger)."""

    parameters: int = 0
    flops: int = 0
    temporary_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        temporary = max(self.temporary_bytes, other.temporary_bytes)
        return Cost(self.parameters + other.parameters, self.flops + other.flops, temporary)

    def values(self, usage: Usage, dense: Cost | None = None) -> dict[str, Any]:
        """For JSON: with the bytes of weights and of the training's state, and FLOPs relative to those of ``dense``."""
        return {
            **vars(self),
            "weight_bytes": self.parameters * usage.dtype.itemsize,
            "state_bytes": self.parameters * STATE_BYTES if usage.training else 0,
            "x_dense": self.flops / dense.flops if dense is not None and dense.flops else None,
        }


Costs = Mapping[str, Cost]  # by design


def _sum(parts: Iterable[Costs]) -> Costs:
    parts = list(parts)
    return {design: sum((part[design] for part in parts), Cost()) for design in DESIGNS}


def _values(costs: Costs, usage: Usage) -> dict[str, Any]:
    return {design: cost.values(usage, costs["dense"]) for design, cost in costs.items()}


def model_costs(inventory: Inventory, config: MPOEConfig, usage: Usage) -> dict[str, Any]:
    """Costs of a model under a configuration, for JSON.

    Returns:
        ``config``; ``layers``: groups of equal layers, each with its ``matrices``, ``router`` and the costs of one
        layer by design; ``totals``: ``feed_forward`` (all of them), ``rest`` (the same in all designs) and ``whole``.
        A cost has the fields of `Cost.values`; a matrix also ``lossless`` (no bond is truncated) and its ``strategy``.

    Raises:
        ValueError: a shape that does not match a layer, tokens missing for a stream.
    """
    missing = [stream for stream in inventory.streams if stream not in usage.tokens]
    if missing:
        raise ValueError(f"tokens must be given for {', '.join(inventory.streams)}; missing: {', '.join(missing)}")
    groups: dict[Any, list[FFNSite]] = {}
    for site in inventory.sites:
        sizes = tuple((kind, *site.weight(kind).shape) for kind in KINDS if kind in site.dense)
        groups.setdefault((sizes, site.bias("up") is not None, usage.tokens[site.stream]), []).append(site)
    layers, every, elements = [], [], 0
    for (sizes, has_bias, tokens), alike in groups.items():
        matrices = [_matrix_costs(size, config, usage, tokens, has_bias) for size in sizes]
        routes = sizes[0][1] * config.num_experts
        router = Cost(routes, 2 * tokens * routes * usage.passes)
        costs = _sum([*(own for _, own in matrices), {"mpoe": router, "switch": router, "dense": Cost()}])
        every += [costs] * len(alike)
        elements += len(alike) * sum(rows * columns for _, rows, columns in sizes)
        values = {"names": [site.name for site in alike], "count": len(alike), "tokens": tokens}
        values |= {"streams": list(dict.fromkeys(site.stream for site in alike)), "router": router.values(usage)}
        layers.append({**values, "matrices": [own for own, _ in matrices], **_values(costs, usage)})
    experts = _sum(every)
    maps = sum(count * 2 * usage.tokens[s] * rows * columns for (s, rows, columns), count in inventory.rest.items())
    rest = Cost(inventory.parameters - elements, maps * usage.passes)
    whole = {design: cost + rest for design, cost in experts.items()}
    totals = {"feed_forward": _values(experts, usage), "rest": rest.values(usage), "whole": _values(whole, usage)}
    return {"config": config.to_dict(), "layers": layers, "totals": totals}


def _matrix_costs(
    size: tuple[str, int, int], config: MPOEConfig, usage: Usage, tokens: int, has_bias: bool
) -> tuple[dict[str, Any], Costs]:
    """Of one projection, (kind, rows, columns), on ``tokens`` tokens, for JSON and by design; ``has_bias``: of the
    network's first projection."""
    kind, rows, columns = size
    experts, slots, elements = config.num_experts, tokens * config.top_k, rows * columns
    dense = Cost(elements, 2 * tokens * elements * usage.passes)
    switch = Cost(experts * elements, 2 * slots * elements * usage.passes)
    shape = None if config.keeps_network else config.shape_for(kind, rows, columns)
    strategy, backward = config.shape, None
    products = 1 if not usage.training else 3 if kind == "down" else 4
    width, hidden = (columns, rows) if kind == "down" else (rows, columns)
    if config.is_hidden:  # blocks [b, b], every group of hidden units a row
        block = config.hidden_block(hidden)
        weights = experts * (hidden // block if config.block_per_group else 1)
        mpoe = dense + Cost(weights * block * block, 2 * slots * hidden * block * products)
    elif shape is None:  # rows of the model's size or the latent one, and two matrices that latent experts share
        neurons, row = config.neurons or 0, width if config.latent is None else config.latent
        biases = experts * neurons if (has_bias or config.expert_bias) and kind == "up" else 0
        mpoe = dense + Cost(experts * neurons * row + biases, 2 * slots * neurons * row * products)
        if config.latent is not None and kind != "gate_proj":
            mpoe += Cost(width * row, 2 * tokens * width * row * usage.passes)
    else:
        routing = {"top_k": config.top_k, "training": usage.training, "mask_central": usage.mask_central}
        plan = plan_contraction(shape, experts, tokens, usage.dtype, **routing)  # type: ignore[arg-type]
        strategy, backward = plan.strategy, plan.backward_strategy
        mpoe = Cost(shape.parameters(experts), plan.flops, plan.temporary_bytes)
    costs = {"mpoe": mpoe, "switch": switch, "dense": dense}
    values = {"kind": kind, "in_features": rows, "out_features": columns}
    values |= {"shape": None if shape is None else shape.to_dict(), "lossless": shape is None or shape.is_full}
    values |= {"strategy": strategy, "backward_strategy": backward}
    return {**values, **_values(costs, usage)}, costs
