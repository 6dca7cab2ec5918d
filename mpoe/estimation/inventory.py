"""The layers of a model, read from its configuration: the model is built on the meta device, without memory."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mpoe.config import MPOEConfig
from mpoe.data.mappings import read_mapping
from mpoe.models.table import CLASS_PREFIX, SEQ2SEQ, TABLE, TYPE_PREFIX


@dataclass(frozen=True)
class Matrix:
    """A projection of a feed-forward network: ``kind`` (up, gate_proj, down) of a weight ``[rows, columns]``."""

    kind: str
    rows: int
    columns: int

    @property
    def elements(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Layer:
    """A feed-forward network that becomes a mixture.

    Attributes:
        name: of the module.
        stream: the stream of its tokens: ``encoder``, ``decoder`` or ``main``.
        matrices: its projections; the first maps the model size to the hidden size.
        has_bias: whether the first has a bias.
    """

    name: str
    stream: str
    matrices: tuple[Matrix, ...]
    has_bias: bool = False

    @property
    def model_size(self) -> int:
        return self.matrices[0].rows


@dataclass(frozen=True)
class Inventory:
    """The properties of a dense model that a plan needs.

    Attributes:
        name: the name that the user typed.
        source: where the sizes came from.
        class_name: Hugging Face class.
        parameters: of the dense model, tied ones counted once.
        layers: feed-forward networks that would be converted.
        rest: matrix maps that stay dense (attention projections, language-model head), as
            ``(stream, rows, columns) -> how many``. BERT's pooler, one row per sequence, is left out.
        mpoe: the configuration of an already converted model, or None.
        blocks_fit: whether it supports experts of the shape "hidden".
    """

    name: str
    source: str
    class_name: str
    parameters: int
    layers: tuple[Layer, ...]
    rest: Mapping[tuple[str, int, int], int]
    mpoe: MPOEConfig | None
    blocks_fit: bool = True

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.stream for layer in self.layers))

    @property
    def ffn_elements(self) -> int:
        """Weights of the layers that would be converted."""
        return sum(matrix.elements for layer in self.layers for matrix in layer.matrices)

    def values(self) -> dict[str, Any]:
        """For JSON."""
        names = ("name", "source", "class_name", "parameters")
        return {**{name: getattr(self, name) for name in names}, "feed_forward_layers": len(self.layers)}


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
    from transformers import PreTrainedConfig

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
    close = get_close_matches(last, KNOWN_SIZES, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    raise ValueError(
        f"model: {name!r} is not a folder or config.json here, not a well-known size "
        f"({', '.join(list(KNOWN_SIZES)[:5])}, ...) and not in the local hub cache{hint}"
    )


def _model_config(values: Mapping[str, Any], name: str) -> tuple[Any, str, MPOEConfig | None]:
    """Dense configuration, name of the class to build, and the MPOE configuration of a converted model."""
    from transformers import AutoConfig

    from mpoe.models.classes import default_class, dense_names

    values = dict(values)
    model_type = str(values.pop("model_type", "unknown"))
    family = model_type.removeprefix(TYPE_PREFIX)
    if family not in TABLE:
        raise ValueError(
            f"model {name!r} is of the family {model_type!r}, which mpoe does not know; "
            f"it knows {', '.join(TABLE)} (and models converted from them)"
        )
    if TABLE[family].is_mixture:
        raise ValueError(f"model {name!r} must be a dense model to be planned; {family} is a mixture already")
    mpoe = values.pop("mpoe", None)
    named = [str(a).removeprefix(CLASS_PREFIX) for a in values.pop("architectures", None) or []]
    known = set(dense_names(family).values())
    class_name = next((a for a in named if a in known), default_class(family))
    try:
        config = AutoConfig.for_model(family, **values)
    except Exception as error:  # configuration classes raise many types of errors
        raise ValueError(f"model: the configuration of {name!r} is not a valid {family} one: {error}") from error
    return config, class_name, None if mpoe is None else MPOEConfig.from_dict(mpoe)


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
    import torch
    import transformers
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from mpoe.models.find import dense_networks

    values, source = read_values(name)
    config, class_name, mpoe = _model_config(values, name)
    try:
        with torch.device("meta"):
            model: Any = getattr(transformers, class_name)(config)
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        raise ValueError(f"model: the configuration of {name!r} builds no {class_name}: {error}") from error
    chosen = MPOEConfig(
        shape="separable", exclude_modules=exclude_modules or [], layers_to_transform=layers_to_transform
    )
    sites = dense_networks(model, chosen)
    layers = []
    converted: set[int] = set()
    for site in sites:
        kinds = [kind for kind in ("up", "gate_proj", "down") if kind in site.dense]
        matrices = tuple(Matrix(kind, *site.weight(kind).shape) for kind in kinds)
        layers.append(Layer(site.name, site.stream, matrices, site.bias("up") is not None))
        converted |= {id(module) for module in site.dense.values()}
    blocks_fit = not any(site.obstacle for site in sites)
    rest: dict[tuple[str, int, int], int] = {}
    for module_name, module in model.named_modules():
        if id(module) in converted or not isinstance(module, (nn.Linear, Conv1D)) or "pooler" in module_name:
            continue
        rows, columns = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        key = (_stream(module_name) if TABLE[config.model_type].style == SEQ2SEQ else "main", rows, columns)
        rest[key] = rest.get(key, 0) + 1
    parameters = sum(p.numel() for p in model.parameters()) + _head_of_its_own(model, values)
    return Inventory(name, source, class_name, parameters, tuple(layers), rest, mpoe, blocks_fit)
