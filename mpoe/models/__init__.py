"""Hugging Face models with MPO experts.

Importing this package is cheap. The classes of a family (``MPOELlamaForCausalLM``, ``MPOELlamaConfig``, ...) are
created, and registered with Transformers' Auto classes, when one of them is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it; loaded on first use.
_NAMES = {
    name: module
    for module, names in {
        "checkpoint": "load_mpoe save_mpoe_only",
        "components": "load_layers",
        "composition": "add_expert compose",
        "convert": "convert_to_mpoe merge_experts",
        "expert_files": "load_expert merge_expert push_expert save_expert start_expert",
        "expert_mixture": "compose_experts",
        "expert_router": "collect_statistics",
        "kept": "merge_latent",
        "original": "import_original",
        "others": "quantisable_parameters",
        "report": "mpo_modules parameter_kind parameter_report",
    }.items()
    for name in names.split()
}
# The classes named in the documentation; those of all other families are found in the same way.
_CLASSES = (
    *("MPOEBertConfig", "MPOEBertForMaskedLM", "MPOEBertForSequenceClassification", "MPOEBertModel"),
    *("MPOEGPT2Config", "MPOEGPT2LMHeadModel", "MPOEGPT2Model"),
    *("MPOELlamaConfig", "MPOELlamaForCausalLM", "MPOELlamaModel"),
    *("MPOET5Config", "MPOET5ForConditionalGeneration", "MPOET5Model"),
)
__all__ = [*_CLASSES, *_NAMES]

if TYPE_CHECKING:
    from mpoe.models.checkpoint import load_mpoe as load_mpoe
    from mpoe.models.checkpoint import save_mpoe_only as save_mpoe_only
    from mpoe.models.components import load_layers as load_layers
    from mpoe.models.composition import add_expert as add_expert
    from mpoe.models.composition import compose as compose
    from mpoe.models.convert import convert_to_mpoe as convert_to_mpoe
    from mpoe.models.convert import merge_experts as merge_experts
    from mpoe.models.expert_files import load_expert as load_expert
    from mpoe.models.expert_files import merge_expert as merge_expert
    from mpoe.models.expert_files import push_expert as push_expert
    from mpoe.models.expert_files import save_expert as save_expert
    from mpoe.models.expert_files import start_expert as start_expert
    from mpoe.models.expert_mixture import compose_experts as compose_experts
    from mpoe.models.expert_router import collect_statistics as collect_statistics
    from mpoe.models.kept import merge_latent as merge_latent
    from mpoe.models.original import import_original as import_original
    from mpoe.models.others import quantisable_parameters as quantisable_parameters
    from mpoe.models.report import mpo_modules as mpo_modules
    from mpoe.models.report import parameter_kind as parameter_kind
    from mpoe.models.report import parameter_report as parameter_report


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
