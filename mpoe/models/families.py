"""How each model family builds its layers; see `mpoe.models.table` for the list of families."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpoe.config.checks import check_fields
from mpoe.models.table import TABLE


def name_pattern(glob: str) -> re.Pattern[str]:
    """Regular expression for module names, with or without a prefix.

    The first ``*`` is the layer's index (group ``layer``), later ones any number; ``{a,b}`` is a or b.
    """
    text = re.escape(glob).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    text = text.replace(r"\*", r"(?P<layer>\d+)", 1).replace(r"\*", r"\d+")
    return re.compile(rf"^(?:.*\.)?{text}$")


@dataclass(frozen=True)
class FFN:
    """One way to build a feed-forward network: names of its parts.

    Attributes:
        holder: names of the modules that hold one, for `name_pattern`.
        up, down, gate_proj: dense projections inside the holder. Orientation follows from their type: `nn.Linear`
            holds ``[out, in]``, `Conv1D` ``[in, out]``.
        fused: kinds whose weights are concatenated along the outputs of ``up``, in order, e.g. ``("gate_proj", "up")``.
        place: name, inside the holder, of the module that an `MPOEFeedForward` replaces; empty = the holder itself.
        emptied: modules inside the holder whose work the experts do; they become identities.
        zeroed: attributes of the holder that are set to 0: a dropout that the experts apply, a chunk size.
        sums: name, inside the holder, of the module that ends a network that is not a module of its own: it holds
            ``down`` and is called with what ``up`` gave and the network's input, which it adds.
        stream: the tokens that it processes: ``"main"``, ``"encoder"`` or ``"decoder"``.
    """

    holder: str
    up: str
    down: str
    gate_proj: str | None = None
    fused: tuple[str, ...] = ()
    place: str = ""
    emptied: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    sums: str = ""
    stream: str = "main"


@dataclass(frozen=True)
class Sites(FFN):
    """`FFN` plus the settings that a known family's model configuration provides: the argument ``sites`` of
    `convert_to_mpoe`.

    Attributes:
        activation: name of the activation between the projections, see `mpoe.layers.activations`.
        dropout: rate between the projections.
        output_dropout: rate that the dense network applies to its result inside the holder.
    """

    activation: str = ""
    dropout: float = 0.0
    output_dropout: float = 0.0


def _of_any_name(config: Any, *names: str, default: Any = None) -> Any:
    """The value of the first of these fields that a configuration has: families call the same thing differently."""
    return next((getattr(config, name) for name in names if getattr(config, name, None) is not None), default)


def _activation(config: Any) -> str:
    activation: str = _of_any_name(config, "dense_act_fn", "hidden_activation", "activation_function", "hidden_act")
    return activation


def _dropout(config: Any) -> float:
    return float(_of_any_name(config, "activation_dropout", "mlp_dropout", "dropout_rate", default=0.0))


def _init_std(config: Any) -> tuple[float, float]:
    std = float(_of_any_name(config, "init_std", "initializer_range", default=0.02))
    return std, std


@dataclass(frozen=True)
class Family:
    """How a model family builds its layers.

    Attributes:
        ffn: its feed-forward networks; the first one that matches a module is used.
        attention: names of attention projections, for `name_pattern`.
        pooler: name of the pooler's projection, if there is one.
        activation, dropout, output_dropout, init_std: read the model's config; ``init_std`` gives up and down.
    """

    ffn: tuple[FFN, ...]
    attention: tuple[str, ...] = ()
    pooler: str | None = None
    activation: Callable[[Any], str] = _activation
    dropout: Callable[[Any], float] = _dropout
    output_dropout: Callable[[Any], float] = lambda config: 0.0
    init_std: Callable[[Any], tuple[float, float]] = _init_std

    @property
    def is_mixture(self) -> bool:
        """Whether its models are already mixtures, without dense networks to convert."""
        return not self.ffn

    @property
    def takes_blocks(self) -> bool:
        """Whether its models support experts of the shape "hidden" between their projections."""
        return bool(self.ffn) and all(not ffn.place or ffn.up.startswith(f"{ffn.place}.") for ffn in self.ffn)


def _t5(stream: str) -> tuple[FFN, ...]:
    plain = FFN(f"{stream}.block.*.layer.*.DenseReluDense", up="wi", down="wo", stream=stream)
    return plain, replace(plain, up="wi_1", gate_proj="wi_0")


def _held_by_layers(holder: str, stream: str = "main", zeroed: tuple[str, ...] = ()) -> FFN:
    """Layers that hold the projections themselves."""
    return FFN(holder, "fc1", "fc2", place="fc1", emptied=("activation_fn", "fc2"), zeroed=zeroed, stream=stream)


# older ViTs, and BERT: two modules, the second of which adds the network's input
_INTERMEDIATE = FFN(
    "{layer,layers}.*",
    up="intermediate.dense",
    down="output.dense",
    place="intermediate",
    emptied=("output.dense",),
    zeroed=("chunk_size_feed_forward",),
)
_GATE_AND_UP = ("gate_proj", "up")
# name of a structure in `TABLE` -> how it is built
_FAMILIES = {
    "t5": Family(
        ffn=(*_t5("encoder"), *_t5("decoder")),
        attention=("{encoder,decoder}.block.*.layer.*.{SelfAttention,EncDecAttention}.{q,k,v,o}",),
        init_std=lambda config: (
            config.initializer_factor * config.d_model**-0.5,
            config.initializer_factor * config.d_ff**-0.5,
        ),
    ),
    "bart": Family(
        ffn=tuple(
            _held_by_layers(f"{side}.layers.*", side, ("activation_dropout",)) for side in ("encoder", "decoder")
        ),
        attention=("{encoder,decoder}.layers.*.{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,out_proj}",),
    ),
    "gpt2": Family(
        ffn=(FFN("h.*.mlp", up="c_fc", down="c_proj"),),
        attention=("h.*.{attn,crossattention}.{c_attn,q_attn,c_proj}",),
        output_dropout=lambda config: config.resid_pdrop,
        init_std=lambda config: (config.initializer_range, config.initializer_range / (2 * config.n_layer) ** 0.5),
    ),
    "gpt_neox": Family(
        ffn=(FFN("layers.*.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),),
        attention=("layers.*.attention.{query_key_value,dense}",),
    ),
    "opt": Family(
        ffn=(_held_by_layers("decoder.layers.*"),),
        attention=("decoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",),
    ),
    "llama": Family(
        ffn=(
            FFN("layers.*.mlp", up="up_proj", gate_proj="gate_proj", down="down_proj"),
            FFN("layers.*.mlp", up="gate_up_proj", down="down_proj", fused=_GATE_AND_UP),  # Phi-3
        ),
        attention=("layers.*.self_attn.{q,k,v,o,qkv}_proj",),
    ),
    "bert": Family(
        ffn=(replace(_INTERMEDIATE, holder="encoder.layer.*", sums="output"),),
        attention=(
            "encoder.layer.*.{attention,crossattention}.{self.query,self.key,self.value,output.dense}",
            "encoder.layer.*.attention.{self.query_proj,self.key_proj,self.value_proj}",  # DeBERTa
        ),
        pooler="pooler.dense",
    ),
    "modernbert": Family(
        ffn=(FFN("layers.*.mlp", up="Wi", down="Wo", fused=_GATE_AND_UP),),
        attention=("layers.*.attn.{Wqkv,Wo}",),
    ),
    "vit": Family(
        ffn=(
            FFN("{layer,layers}.*.mlp", up="fc1", down="fc2"),
            _INTERMEDIATE,
        ),  # newer and older versions
        attention=(
            "{layer,layers}.*.attention.{q_proj,k_proj,v_proj,o_proj,out_proj}",
            "{layer,layers}.*.attention.{attention.query,attention.key,attention.value,output.dense}",
        ),
        pooler="pooler.dense",
    ),
    # Mixtures keep routers, shared experts and dense layers; `mpoe.models.stock_experts` converts their experts.
    "mixture": Family(ffn=(), attention=("layers.*.self_attn.{q,k,v,o}_proj",)),
}


def family_of(model_type: str) -> Family:
    """The family of a dense model's ``model_type``, which must be in `TABLE`."""
    return _FAMILIES[TABLE[model_type].layers]


def family_for(sites: Mapping[str, Any] | None, model_type: str) -> Family:
    """The family that checked ``sites`` describe, or that of ``model_type`` if they are None."""
    if sites is None:
        return family_of(model_type)
    values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in sites.items()}
    given = Sites(**values)
    return Family(
        ffn=(given,),
        activation=lambda config: given.activation,
        dropout=lambda config: given.dropout,
        output_dropout=lambda config: given.output_dropout,
    )


def checked_sites(sites: Any) -> dict[str, Any]:
    """``sites`` as a JSON-able dict.

    Raises:
        TypeError: not a mapping, or fields of other types.
        ValueError: an unknown field, a holder without ``*``.
    """
    if not isinstance(sites, Mapping):
        wanted = "a mapping with 'holder', 'up', 'down', 'activation'"
        raise TypeError(f"sites must be {wanted}; got {type(sites).__name__}")
    check_fields(Sites, sites, "sites")
    missing = [name for name in ("holder", "up", "down", "activation") if not sites.get(name)]
    if missing:
        raise ValueError(f"sites must name 'holder', 'up', 'down' and 'activation'; {', '.join(missing)} is missing")
    for name in ("holder", "up", "down", "gate_proj", "place", "sums", "stream"):
        if not isinstance(sites.get(name) or "", str):
            raise TypeError(f"sites[{name!r}] must be a name; got {sites[name]!r}")
    for name in ("fused", "emptied", "zeroed"):
        given = sites.get(name, ())
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise TypeError(f"sites[{name!r}] must be a list of names; got {given!r}")
    if "*" not in sites["holder"]:
        raise ValueError(f"sites['holder'] must hold a * for the number of the layer; got {sites['holder']!r}")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in sites.items()}
