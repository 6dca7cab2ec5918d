"""Hugging Face models with MPO experts.

Importing this package is cheap. The classes of a family (``MPOELlamaForCausalLM``,
``MPOELlamaConfig``, ...) are created, and registered with Transformers' Auto classes, when one of
them is first used.
"""

from typing import Any

from mpoe.lazy import loader_of

# Module -> the public names that are loaded from it on first use.
_HOMES = {
    "mpoe.models.checkpoint": "load_layers load_mpoe save_mpoe_only",
    "mpoe.models.composition": "collect_statistics compose",
    "mpoe.models.convert": "convert_to_mpoe merge_experts merge_latent",
    "mpoe.models.expert_files": "load_expert merge_expert push_expert save_expert start_expert",
    "mpoe.models.expert_mixture": "compose_experts",
    "mpoe.models.original": "import_original",
    "mpoe.models.report": "parameter_kind parameter_report",
    "mpoe.models.walk": "mpo_modules",
}
# The classes named in the documentation; those of all other families are found in the same way.
_CLASSES = (
    "MPOEBertConfig",
    "MPOEBertForMaskedLM",
    "MPOEBertForSequenceClassification",
    "MPOEBertModel",
    "MPOEGPT2Config",
    "MPOEGPT2LMHeadModel",
    "MPOEGPT2Model",
    "MPOELlamaConfig",
    "MPOELlamaForCausalLM",
    "MPOELlamaModel",
    "MPOET5Config",
    "MPOET5ForConditionalGeneration",
    "MPOET5Model",
)
__all__ = [*_CLASSES, *" ".join(_HOMES.values()).split()]
_load = loader_of(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    if name.startswith("MPOE"):
        from mpoe.models.classes import class_named

        value = class_named(name)
        if value is not None:
            return value
    return _load(name)


def __dir__() -> list[str]:
    return sorted(__all__)
