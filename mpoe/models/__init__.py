"""Hugging Face models with MPO experts.

Importing this package is cheap. The classes of a family (``MPOELlamaForCausalLM``,
``MPOELlamaConfig``, ...) are created, and registered with Transformers' Auto classes, when one of
them is first used.
"""

import importlib
from typing import Any

# Public name -> the module that defines it; loaded on first use.
_NAMES = {
    name: module
    for module, names in {
        "checkpoint": "load_layers load_mpoe save_mpoe_only",
        "composition": "collect_statistics compose",
        "convert": "convert_to_mpoe merge_experts merge_latent",
        "expert_files": "load_expert merge_expert push_expert save_expert start_expert",
        "expert_mixture": "compose_experts",
        "original": "import_original",
        "report": "parameter_kind parameter_report",
        "walk": "mpo_modules",
    }.items()
    for name in names.split()
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
__all__ = [*_CLASSES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f"mpoe.models.{_NAMES[name]}"), name)
    elif name.startswith("MPOE"):
        from mpoe.models.classes import class_named

        value = class_named(name)
    else:
        value = None
    if value is None:
        raise AttributeError(f"module 'mpoe.models' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
