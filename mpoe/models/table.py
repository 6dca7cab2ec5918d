"""The model families that conversion knows, and how each builds its layers. Nothing here imports
torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpoe.config.checks import (
    check_choice,
    check_fields,
    check_list,
    check_number,
    check_type,
    quoted,
)

SEQ2SEQ = "seq2seq"
CAUSAL = "causal"
ENCODER = "encoder"
STREAMS = ("main", "encoder", "decoder")
# prefix of a converted model's `model_type` and of its class name
TYPE_PREFIX = "mpoe_"
CLASS_PREFIX = "MPOE"


_GLOB = re.compile(r"(?:[\w.*]|\{[\w.*,]+\})+")  # what `name_pattern` takes


def name_pattern(glob: str) -> re.Pattern[str]:
    """Regular expression for module names, with or without a prefix.

    The first ``*`` is the layer's index (group ``layer``), later ones any number; ``{a,b}`` is a or
    b. See `_GLOB`.
    """
    text = re.escape(glob).replace(r"\{", "(?:").replace(r"\}", ")").replace(",", "|")
    text = text.replace(r"\*", r"(?P<layer>\d+)", 1).replace(r"\*", r"\d+")
    return re.compile(rf"^(?:.*\.)?{text}$")


def _of_any_name(config: Any, *names: str, default: Any = None) -> Any:
    """The value of the first of these fields that a configuration has: families call the same thing
    differently."""
    return next(
        (getattr(config, name) for name in names if getattr(config, name, None) is not None),
        default,
    )


@dataclass(frozen=True)
class FFN:
    """One way to build a feed-forward network: names of its parts, and settings; also the argument
    ``sites`` of `convert_to_mpoe`.

    Attributes:
        holder: names of the modules that hold one, for `name_pattern`.
        up, down, gate_proj: dense projections inside the holder. Orientation follows from their
            type: `nn.Linear` holds ``[out, in]``, `Conv1D` ``[in, out]``.
        fused: kinds whose weights are concatenated along the outputs of ``up``, in order, e.g.
            ``("gate_proj", "up")``.
        place: name, inside the holder, of the module that an `MPOEFeedForward` replaces; empty =
            the holder itself.
        emptied: modules inside the holder whose work the experts do; they become identities.
        zeroed: attributes of the holder that are set to 0 where it has them: a dropout that the
            experts apply, a chunk size.
        sums: name, inside the holder, of the module that ends a network that is not a module of its
            own: it holds ``down`` and is called with what ``up`` gave and the network's input,
            which it adds.
        stream: the tokens that it processes, one of `STREAMS`.
        activation: name of the activation between the projections, see `mpoe.layers.experts`; of a
            known family the model's configuration names it.
        dropout: rate between the projections; ``None`` = that of the model's configuration
            (``sites``: default 0).
        output_dropout: rate that the dense network applies to its result inside the holder, or the
            configuration's field of it.
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
    activation: str = ""
    dropout: float | None = None
    output_dropout: float | str = 0.0

    def kinds(self) -> dict[str, str]:
        """Names of the projections by kind."""
        gate = {} if self.gate_proj is None else {"gate_proj": self.gate_proj}
        return {"up": self.up, "down": self.down, **gate, **dict.fromkeys(self.fused, self.up)}

    def settings(self, config: Any) -> dict[str, Any]:
        """Activation and rates in a model of this configuration.

        Raises:
            ValueError: it lacks the field that ``output_dropout`` names.
        """
        activations = ("dense_act_fn", "hidden_activation", "activation_function", "hidden_act")
        dropout = self.dropout
        output_dropout = self.output_dropout
        if isinstance(output_dropout, str):
            if not hasattr(config, output_dropout):
                raise ValueError(
                    "output_dropout must be a rate or a field of the model's configuration; got "
                    f"{quoted(output_dropout)}"
                )
            output_dropout = getattr(config, output_dropout)
        if dropout is None:
            dropout = _of_any_name(
                config, "activation_dropout", "mlp_dropout", "dropout_rate", default=0.0
            )
        return {
            "activation": self.activation or _of_any_name(config, *activations),
            "dropout": float(dropout),
            "output_dropout": float(output_dropout),
        }


def _init_std(config: Any) -> tuple[float, float]:
    std = float(_of_any_name(config, "init_std", "initializer_range", default=0.02))
    return std, std


@dataclass(frozen=True)
class Family:
    """Models that build their layers alike.

    Attributes:
        models: Hugging Face `model_type`s of the dense models, separated by spaces.
        style: how the command line trains and evaluates them: ``"seq2seq"``, ``"causal"`` or
            ``"encoder"``.
        ffn: their feed-forward networks; the first one that matches a module is used.
        attention: names of attention projections, for `name_pattern`.
        pooler: name of the pooler's projection, if there is one.
        init_std: standard deviations of up and down projections, by the model's configuration.
    """

    models: str
    style: str
    ffn: tuple[FFN, ...]
    attention: tuple[str, ...] = ()
    pooler: str | None = None
    init_std: Callable[[Any], tuple[float, float]] = _init_std

    @property
    def takes_blocks(self) -> bool:
        """Whether its models support experts of the shape "hidden" between their projections."""
        return all(not ffn.place or ffn.up.startswith(f"{ffn.place}.") for ffn in self.ffn)


def _t5(stream: str) -> tuple[FFN, ...]:
    plain = FFN(f"{stream}.block.*.layer.*.DenseReluDense", up="wi", down="wo", stream=stream)
    return plain, replace(plain, up="wi_1", gate_proj="wi_0")


# layers that hold the projections themselves
_HELD = FFN("decoder.layers.*", "fc1", "fc2", place="fc1", emptied=("activation_fn", "fc2"))
_BART = replace(_HELD, zeroed=("activation_dropout",), stream="decoder")
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
_FAMILIES = (
    Family(
        "t5 mt5 umt5",
        SEQ2SEQ,
        ffn=(*_t5("encoder"), *_t5("decoder")),
        attention=("{encoder,decoder}.block.*.layer.*.{SelfAttention,EncDecAttention}.{q,k,v,o}",),
        init_std=lambda config: (
            config.initializer_factor * config.d_model**-0.5,
            config.initializer_factor * config.d_ff**-0.5,
        ),
    ),
    Family(
        "bart",
        SEQ2SEQ,
        ffn=(replace(_BART, holder="encoder.layers.*", stream="encoder"), _BART),
        attention=(
            "{encoder,decoder}.layers.*.{self_attn,encoder_attn}.{q_proj,k_proj,v_proj,out_proj}",
        ),
    ),
    Family(
        "gpt2",
        CAUSAL,
        ffn=(FFN("h.*.mlp", up="c_fc", down="c_proj", output_dropout="resid_pdrop"),),
        attention=("h.*.{attn,crossattention}.{c_attn,q_attn,c_proj}",),
        init_std=lambda config: (
            config.initializer_range,
            config.initializer_range / (2 * config.n_layer) ** 0.5,
        ),
    ),
    Family(
        "gpt_neox",
        CAUSAL,
        ffn=(FFN("layers.*.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),),
        attention=("layers.*.attention.{query_key_value,dense}",),
    ),
    Family(
        "opt",
        CAUSAL,
        ffn=(_HELD,),
        attention=("decoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}",),
    ),
    Family(
        "llama mistral qwen2 qwen3 olmo2 smollm3 gemma2 gemma3_text phi3",
        CAUSAL,
        ffn=(
            FFN("layers.*.mlp", up="up_proj", gate_proj="gate_proj", down="down_proj"),
            # Phi-3
            FFN("layers.*.mlp", up="gate_up_proj", down="down_proj", fused=_GATE_AND_UP),
        ),
        attention=("layers.*.self_attn.{q,k,v,o,qkv}_proj",),
    ),
    Family(
        "bert roberta deberta-v2",
        ENCODER,
        ffn=(replace(_INTERMEDIATE, holder="encoder.layer.*", sums="output"),),
        attention=(
            "encoder.layer.*.{attention,crossattention}.{self.query,self.key,self.value,output.dense}",
            # DeBERTa
            "encoder.layer.*.attention.{self.query_proj,self.key_proj,self.value_proj}",
        ),
        pooler="pooler.dense",
    ),
    Family(
        "modernbert",
        ENCODER,
        ffn=(FFN("layers.*.mlp", up="Wi", down="Wo", fused=_GATE_AND_UP),),
        attention=("layers.*.attn.{Wqkv,Wo}",),
    ),
    Family(
        "vit",
        ENCODER,
        # of newer and of older versions of Transformers
        ffn=(FFN("{layer,layers}.*.mlp", up="fc1", down="fc2"), _INTERMEDIATE),
        attention=(
            "{layer,layers}.*.attention.{q_proj,k_proj,v_proj,o_proj,out_proj}",
            "{layer,layers}.*.attention.{attention.query,attention.key,attention.value,output.dense}",
        ),
        pooler="pooler.dense",
    ),
)
# Fields in which configurations of mixtures have the number of their experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Hugging Face `model_type` of the dense model -> its family
TABLE = {model_type: family for family in _FAMILIES for model_type in family.models.split()}
MODEL_TYPES = tuple(TYPE_PREFIX + model_type for model_type in TABLE)


def known_type(name: str, values: Mapping[str, Any]) -> str:
    """The ``model_type`` in a configuration of the model ``name``, if it is in the table, converted
    or not.

    Raises:
        ValueError: it is another.
    """
    model_type = str(values.get("model_type", "unknown"))
    if model_type not in (*TABLE, *MODEL_TYPES):
        raise ValueError(
            f"model {name!r} is of the family {quoted(model_type)}, which mpoe does not know; it "
            f"knows {', '.join(TABLE)} (and models converted from them)"
        )
    return model_type


def family_for(sites: Mapping[str, Any] | None, model_type: str) -> Family:
    """The family that checked ``sites`` describe, or that of ``model_type`` if they are None."""
    if sites is None:
        return TABLE[model_type]
    values: dict[str, Any] = {"dropout": 0.0}
    for name, value in sites.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    # `style` is the command line's alone, which takes no sites
    return Family(model_type, CAUSAL, (FFN(**values),))


def checked_sites(sites: Any) -> dict[str, Any]:
    """``sites`` as a JSON-able dict.

    Raises:
        TypeError: not a mapping, or fields of other types.
        ValueError: an unknown field, a missing one, a holder without ``*``, an unknown stream or
            kind, a rate outside 0 to 1.
    """
    check_type("sites", sites, Mapping, "a mapping with 'holder', 'up', 'down', 'activation'")
    check_fields(FFN, sites, "sites")
    for name in ("holder", "up", "down", "gate_proj", "place", "sums", "stream", "activation"):
        if sites.get(name) is not None:
            check_type(f"sites[{name!r}]", sites[name], str, "a name")
    for name in ("fused", "emptied", "zeroed"):
        check_list(f"sites[{name!r}]", sites.get(name, ()), "names")
        for number, value in enumerate(sites.get(name, ())):
            check_type(f"sites[{name!r}][{number}]", value, str, "a name")
    for number, kind in enumerate(sites.get("fused", ())):
        check_choice(f"sites['fused'][{number}]", kind, ("gate_proj", "up"))
    for name in ("dropout", "output_dropout"):
        is_field = name == "output_dropout" and isinstance(sites.get(name), str)
        if sites.get(name) is not None and not is_field:
            check_number(f"sites[{name!r}]", sites[name], 0, 1)
    check_choice("sites['stream']", sites.get("stream", "main"), STREAMS)
    missing = [name for name in ("holder", "up", "down", "activation") if not sites.get(name)]
    if missing:
        raise ValueError(
            "sites must name 'holder', 'up', 'down' and 'activation'; it lacks "
            f"{', '.join(missing)}"
        )
    if "*" not in sites["holder"] or not _GLOB.fullmatch(sites["holder"]):
        raise ValueError(
            "sites['holder'] must hold a * for the number of the layer, and commas in {a,b} alone; "
            f"got {quoted(sites['holder'])}"
        )
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in sites.items()
    }
