"""Hugging Face models with MPO experts.

Importing this package is cheap. The classes of a family (``MPOELlamaForCausalLM``, ``MPOELlamaConfig``, ...) are
created, and registered with Transformers' Auto classes, when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it; loaded on first use.
_NAMES = {
    "add_expert": "composition",
    "collect_statistics": "expert_router",
    "compose": "composition",
    "compose_experts": "expert_mixture",
    "convert_to_mpoe": "convert",
    "import_original": "original",
    "load_expert": "expert_files",
    "load_layers": "components",
    "load_mpoe": "checkpoint",
    "merge_expert": "expert_files",
    "merge_experts": "convert",
    "merge_latent": "kept",
    "mpo_modules": "report",
    "parameter_kind": "report",
    "parameter_report": "report",
    "push_expert": "expert_hub",
    "quantisable_parameters": "others",
    "save_expert": "expert_files",
    "save_mpoe_only": "checkpoint",
    "start_expert": "expert_files",
}

if TYPE_CHECKING:
    from mpoe.models.checkpoint import load_mpoe, save_mpoe_only
    from mpoe.models.components import load_layers
    from mpoe.models.composition import add_expert, compose
    from mpoe.models.convert import convert_to_mpoe, merge_experts
    from mpoe.models.expert_files import load_expert, merge_expert, save_expert, start_expert
    from mpoe.models.expert_hub import push_expert
    from mpoe.models.expert_mixture import compose_experts
    from mpoe.models.expert_router import collect_statistics
    from mpoe.models.kept import merge_latent
    from mpoe.models.original import import_original
    from mpoe.models.others import quantisable_parameters
    from mpoe.models.report import mpo_modules, parameter_kind, parameter_report

# The classes named in the documentation; those of all other families are found in the same way.
_CLASSES = [
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
]
__all__ = [
    *_CLASSES,
    "add_expert",
    "collect_statistics",
    "compose",
    "compose_experts",
    "convert_to_mpoe",
    "import_original",
    "load_expert",
    "load_layers",
    "load_mpoe",
    "merge_expert",
    "merge_experts",
    "merge_latent",
    "mpo_modules",
    "parameter_kind",
    "parameter_report",
    "push_expert",
    "quantisable_parameters",
    "save_expert",
    "save_mpoe_only",
    "start_expert",
]


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
