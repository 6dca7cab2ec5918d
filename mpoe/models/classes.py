"""Model and configuration classes, created by a rule from a dense class, its family and its head.

Transformers' own tables list the class of each family for each head. They are read, and the classes
created, when a family is first used.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_type_hints

import transformers
from torch import Tensor
from transformers import AutoConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto
from transformers.utils.generic import ModelOutput

from mpoe.config import MPOEConfig
from mpoe.layers.context import Entered, RoutingContext
from mpoe.models.base import ROUTING_FIELDS, MPOEModelMixin, last_tokens
from mpoe.models.kept_weights import kept_while_generating
from mpoe.models.table import CAUSAL, CLASS_PREFIX, ENCODER, SEQ2SEQ, TABLE, TYPE_PREFIX


class MPOESeq2SeqMixin(MPOEModelMixin):
    """Mixture-of-experts part of T5, BART and similar models."""

    def token_masks(self, kwargs: dict) -> dict[str, Tensor | None]:
        """Encoder: ``attention_mask``. Decoder: ``decoder_attention_mask``, else all tokens up to
        the last label != -100.

        An ignored label in the middle of a target is not padding: its position is still attended
        to. Only a language model's labels are tokens. A model with only one side uses only
        ``attention_mask``.
        """
        main = last_tokens(kwargs.get("attention_mask"), kwargs, "input_ids", "inputs_embeds")
        if "decoder_input_ids" not in self._forward_names:
            return {"encoder": main, "decoder": main}
        labels = kwargs.get("labels")
        decoder_mask = kwargs.get("decoder_attention_mask")
        if decoder_mask is None and labels is not None and self.can_generate():
            decoder = labels.ne(-100).flip(-1).cumsum(-1).flip(-1) > 0
        else:
            decoder = last_tokens(
                decoder_mask, kwargs, "decoder_input_ids", "decoder_inputs_embeds"
            )
        return {"encoder": main, "decoder": decoder}

    def generation_masks(self, args: tuple, kwargs: dict) -> dict[str, Tensor | None]:
        """Transformers runs the encoder separately: it must also see which tokens are padding."""
        if "decoder_input_ids" not in self._forward_names:
            return {}
        mask = kwargs.get("attention_mask")
        if mask is None:
            ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            pad = self.generation_config.pad_token_id
            end = self.generation_config.eos_token_id
            pad = self.config.pad_token_id if pad is None else pad
            ends = end if isinstance(end, list) else [end]
            # As in Transformers: if padding and end of text are the same token, they cannot be told
            # apart.
            if isinstance(ids, Tensor) and ids.dim() == 2 and pad is not None and pad not in ends:
                mask = ids.ne(pad)
        return {"encoder": last_tokens(mask, {}, "", "")}


@dataclass
class RoutingFields:
    """Fields that every MPOE model adds to its family's output.

    Attributes:
        task_loss: the loss without ``aux_loss``; present when labels are given.
        aux_loss: weighted sum over layers of the load-balancing and z-losses, float32 scalar.
        router_logits: raw logits per layer in order of execution, float32 ``[B * S, E]`` each.
        expert_load: slots each expert worked on, int64 ``[layers, E]``, detached; padding and
            dropped tokens are not counted.
    """

    task_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None
    expert_load: Tensor | None = None


@functools.cache
def output_with_routing(dense: type[ModelOutput]) -> type[ModelOutput]:
    """``dense`` with `RoutingFields`, named ``MPOE<dense>``."""
    names = {
        "__doc__": f"`{dense.__name__}` with `RoutingFields`.",
        "__module__": __name__,
    }
    return dataclass(type(f"MPOE{dense.__name__}", (RoutingFields, dense), names))


def output_of(forward: Callable) -> type[ModelOutput]:
    """The output class of a dense model's ``forward``, by its annotation, with `RoutingFields`."""
    annotation = get_type_hints(forward)["return"]
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
    return output_with_routing(next(kind for kind in kinds if issubclass(kind, ModelOutput)))


# Auto class -> Transformers' table of its classes
HEADS = {
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTextEncoding": "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES",
}
# head of a family when nothing else is known
STYLE_HEADS = {
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    CAUSAL: "AutoModelForCausalLM",
    ENCODER: "AutoModel",
}
MODULE = "mpoe.models"
IGNORED_AT_INFERENCE = ["cache", "past_key_values", *ROUTING_FIELDS]

if TYPE_CHECKING:
    _Config = PreTrainedConfig
else:
    _Config = object


class MPOEConfigMixin(_Config):
    """Goes before the dense configuration in the bases. ``mpoe`` is the dict of an
    `mpoe.MPOEConfig`.

    ``output_router_logits`` is Transformers' option of that name: ``None`` (the default) and
    ``True`` return the routers' outputs, ``False`` leaves out the fields of `RoutingFields`; the
    loss always contains the auxiliary losses. The expert-parallel plan is empty: experts and
    routers are replicated on every rank.
    """

    mpoe: dict
    base_model_ep_plan: ClassVar[Any] = {}

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: `MPOEModelMixin.save_pretrained` writes the remote code itself."""


def config_class_for(dense: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of converted ``dense`` models."""

    def __init__(self: Any, mpoe: Any = None, **kwargs: Any) -> None:
        if not isinstance(mpoe, MPOEConfig):
            mpoe = MPOEConfig.from_dict(mpoe or {})
        self.mpoe = mpoe.to_dict()
        dense.__init__(self, **kwargs)

    ignored = [*IGNORED_AT_INFERENCE, *(getattr(dense, "keys_to_ignore_at_inference", None) or [])]
    return type(
        f"{CLASS_PREFIX}{dense.__name__}",
        (MPOEConfigMixin, dense),
        {
            "__init__": __init__,
            "__module__": MODULE,
            "__doc__": f"`{dense.__name__}` with a field ``mpoe``: the dict of an "
            "`mpoe.MPOEConfig`.",
            "model_type": f"{TYPE_PREFIX}{dense.model_type}",
            "keys_to_ignore_at_inference": list(dict.fromkeys(ignored)),
        },
    )


def _config_name(model_type: str) -> str:
    """Name of the dense configuration class of a family."""
    return vars(configuration_auto)["CONFIG_MAPPING_NAMES"][model_type]


def dense_names(model_type: str) -> dict[str, str]:
    """Auto class -> name of the dense class that a family has for it."""
    heads = {auto: getattr(modeling_auto, table).get(model_type) for auto, table in HEADS.items()}
    return {
        auto: name if isinstance(name, str) else name[0]
        for auto, name in heads.items()
        if name is not None
    }


def make_class(
    dense: type[PreTrainedModel],
    config: type[PreTrainedConfig],
    model_type: str,
    mixin: type[Any],
    autos: dict[str, str],
) -> type[Any]:
    """The class of a converted ``dense`` model.

    Args:
        dense: a model class of Transformers, or a similar one.
        config: configuration class of the converted model.
        model_type: its family in `TABLE`, or of the dense configuration.
        mixin: `MPOEModelMixin` or a class below it.
        autos: Auto class -> name of the converted class, for the whole family.
    """
    name = f"{CLASS_PREFIX}{dense.__name__}"
    causal = autos.get("AutoModelForCausalLM") == name
    original = inspect.unwrap(dense.forward)

    @functools.wraps(dense.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._routed_forward(super(made, self).forward, args, kwargs)

    @functools.wraps(dense.__init__)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(*args, **kwargs)

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        context = RoutingContext(self.generation_masks(args, kwargs), None, is_generating=True)
        with Entered(context), kept_while_generating(self, self._expert_cache_bytes):
            return super(made, self).generate(*args, **kwargs)

    in_float32 = set(mixin._keep_in_fp32_modules_strict or ())
    in_float32 |= set(dense._keep_in_fp32_modules_strict or ())
    namespace = {
        "__doc__": f"`{dense.__name__}` whose feed-forward networks are mixtures of experts.",
        "__module__": MODULE,
        "__init__": __init__,
        "forward": forward,
        "config_class": config,
        "dense_class": dense,
        "mpoe_family": model_type,
        "mpoe_output": output_of(dense.forward),
        # Current causal heads pass them to `loss_function`; older ones compute their loss
        # themselves.
        "accepts_loss_kwargs": causal and "loss_function" in original.__code__.co_names,
        "auto_classes": {
            auto: converted
            for auto, converted in autos.items()
            if auto == "AutoModel" or converted == name
        },
        "_keep_in_fp32_modules_strict": in_float32,
        # Transformers looks for it in the file that defines the class.
        "_can_set_attn_implementation": classmethod(
            lambda cls: dense._can_set_attn_implementation()
        ),
    }
    bases: tuple[type[Any], ...] = (mixin, dense)
    if issubclass(dense, GenerationMixin):
        bases = (*bases, GenerationMixin)
        namespace["generate"] = functools.wraps(dense.generate)(generate)
    made: Any = type(name, bases, namespace)
    return made


def _made(
    dense_of: Mapping, config: type[PreTrainedConfig], model_type: str, mixin: type[Any]
) -> dict[type[PreTrainedModel], type[Any]]:
    """Dense class -> MPOE class, registered with Transformers' Auto classes, for the dense class of
    each Auto class."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    autos = {auto: f"{CLASS_PREFIX}{dense.__name__}" for auto, dense in dense_of.items() if auto}
    made: dict[type[PreTrainedModel], type[Any]] = {}
    for auto, dense in dense_of.items():
        if dense not in made:
            made[dense] = make_class(dense, config, model_type, mixin, autos)
        if auto:
            getattr(transformers, auto).register(config, made[dense], exist_ok=True)
    return made


@functools.cache
def classes_of(model_type: str) -> dict[type[PreTrainedModel], type[Any]]:
    """Dense class -> MPOE class, for every head of a family in `TABLE`."""
    row = TABLE[model_type]
    mixin = MPOESeq2SeqMixin if row.style == SEQ2SEQ else MPOEModelMixin
    config = config_class_for(getattr(transformers, _config_name(model_type)))
    dense_of = {auto: getattr(transformers, name) for auto, name in dense_names(model_type).items()}
    return _made(dense_of, config, model_type, mixin)


@functools.cache
def foreign_class(dense: Any) -> type[Any]:
    """The MPOE class of a dense class whose family is not in `TABLE`."""
    model_type = dense.config_class.model_type
    heads = [auto for auto, name in dense_names(model_type).items() if name == dense.__name__]
    config = config_class_for(dense.config_class)
    mixin: Any = MPOEModelMixin
    if "decoder_input_ids" in inspect.signature(dense.forward).parameters:
        mixin = MPOESeq2SeqMixin
    head = heads[0] if heads else ""
    return _made({head: dense}, config, model_type, mixin)[dense]


def default_class(model_type: str) -> str:
    """Name of a family's dense class if no head is specified."""
    return dense_names(model_type)[STYLE_HEADS[TABLE[model_type].style]]


def class_named(name: str) -> type[Any] | None:
    """The MPOE model or configuration class of this name, or ``None``."""
    dense: Any = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if not name.startswith(CLASS_PREFIX) or not inspect.isclass(dense):
        return None
    if not issubclass(dense, (PreTrainedConfig, PreTrainedModel)):
        return None
    config: Any = dense if issubclass(dense, PreTrainedConfig) else dense.config_class
    made = classes_of(config.model_type) if config.model_type in TABLE else {}
    if dense is config:
        return next(iter(made.values())).config_class if made else config_class_for(dense)
    # of a Transformers model outside `TABLE`, converted with ``sites``; classes can be hashed
    return made.get(dense) or foreign_class(dense)  # type: ignore[arg-type]
