"""Makes PEFT support MPO weights as soon as both packages are imported.

PEFT supports linear layers and parameters; a model cannot register its own layers for a configuration that was read
from a file. Two of PEFT's functions are therefore wrapped (by `mpoe.registration`, when PEFT is imported): LoRA on
`MPOCores` then works without further steps; methods that do not support cores, or configurations that name none, raise
an error or warn.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from typing import Any

ADVICE = (
    "MPO weights take LoRA: name up, down and gate_proj of the experts, or cores, in target_modules of a LoraConfig "
    "(mpoe.lora_on_cores checks it)"
)


def _cores(model: Any) -> list[str]:
    """Names of a model's MPO weights, without importing modules that no model has needed yet."""
    layers = sys.modules.get("mpoe.layers.cores")
    if layers is None:
        return []
    found = (name for name, module in model.named_modules() if isinstance(module, layers.MPOCores))
    return [name.removesuffix(".base_layer") for name in found]


def teach_lora(module: Any) -> None:
    """Make LoRA (``peft.tuners.lora.model``) create our adapter for MPO weights, with any configuration."""
    known: Callable[..., Any] = module.LoraModel._create_new_module

    @functools.wraps(known)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        layers = sys.modules.get("mpoe.layers.cores")
        if layers is not None and isinstance(target, layers.MPOCores):
            importlib.import_module("mpoe.models.lora").lora_on_cores(lora_config)
        return known(lora_config, adapter_name, target, **kwargs)

    module.LoraModel._create_new_module = staticmethod(create)


def teach_tuners(module: Any) -> None:
    """Make every method (``peft.tuners.tuners_utils``) report MPO weights that it does not adapt.

    Warns if an adapter adapts no MPO weight of a model; raises an error of PEFT's type if a method cannot adapt them,
    or its targets do not exist.
    """
    known: Callable[..., Any] = module.BaseTuner.inject_adapter

    @functools.wraps(known)
    def inject(self: Any, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        cores = _cores(model)
        if not cores:
            return known(self, model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        try:
            result = known(self, model, adapter_name, *args, **kwargs)
        except (ValueError, TypeError) as error:  # which of them is raised depends on the method
            text = str(error)
            absent, unknown = text.startswith("Target modules"), text.startswith("Target module") and "MPOCores" in text
            if absent or unknown:
                reason = text if absent else "it knows no MPO weights"
                raise type(error)(f"{type(config).__name__} does not fit: {reason}; {ADVICE}") from error
            raise
        reached = getattr(self, "targeted_module_names", [])
        if not any(name.startswith(core) for core in cores for name in reached):
            warnings.warn(
                f"this {type(config).__name__} adapts none of {len(cores)} MPO weights; {ADVICE}", stacklevel=3
            )
        return result

    module.BaseTuner.inject_adapter = inject
