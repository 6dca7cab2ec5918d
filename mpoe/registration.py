"""Makes ``import mpoe`` enough for Transformers' Auto classes to know MPOE checkpoints, and PEFT MPO weights, without
importing either.

Transformers takes seconds to import, and the command line must start at once. So only placeholders are registered with
`AutoConfig`, as soon as its module is imported; opening the first MPOE checkpoint of a family creates and registers the
real classes (`mpoe.models.classes`).

PEFT supports linear layers and parameters; a model cannot register its own layers for a configuration that was read
from a file. Two of PEFT's functions are therefore wrapped when it is imported: LoRA on `MPOCores` then works without
further steps; methods that do not support cores, or configurations that name none, raise an error or warn.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mpoe.models.table import MODEL_TYPES, TYPE_PREFIX

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _place_holder(model_type: str, auto: Any) -> type:
    def real() -> Any:
        importlib.import_module("mpoe.models.classes").classes_of(model_type.removeprefix(TYPE_PREFIX))
        return auto.CONFIG_MAPPING[model_type]

    class DeferredConfig:
        """Stands for an MPOE config class until its family is used."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_dict(*args, **kwargs)

    DeferredConfig.model_type = model_type  # type: ignore[attr-defined]
    return DeferredConfig


def _register(auto: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type not in auto.CONFIG_MAPPING:
            auto.AutoConfig.register(model_type, _place_holder(model_type, auto))


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


# Module of another package -> function to run once it is imported
_AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    _AUTO_CONFIG: _register,
    "peft.tuners.lora.model": teach_lora,
    "peft.tuners.tuners_utils": teach_tuners,
}


class _Finder(MetaPathFinder):
    """Waits for the import of some modules, once each."""

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        after = self._waiting.pop(fullname, None)  # at once: the search below asks this finder again
        if after is None:
            return None
        spec = importlib.util.find_spec(fullname)
        loader: Any = None if spec is None else spec.loader
        if loader is not None:
            execute = loader.exec_module

            def both(module: ModuleType) -> None:
                execute(module)
                after(module)

            loader.exec_module = both
        return spec


def register() -> None:
    """Run the follow-ups of importing Transformers' `AutoConfig` and PEFT: now if they are already imported, otherwise
    later."""
    waiting = {}
    for name, after in _AFTER_IMPORT.items():
        if name in sys.modules:
            after(sys.modules[name])
        else:
            waiting[name] = after
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))
