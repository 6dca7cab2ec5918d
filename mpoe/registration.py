"""Makes ``import mpoe`` enough for Transformers' Auto classes to know MPOE checkpoints, and PEFT
MPO weights, without importing either.

Transformers takes seconds to import, and the command line must start at once. So only placeholders
are registered with `AutoConfig`, as soon as its module is imported; opening the first MPOE
checkpoint of a family creates and registers the real classes (`mpoe.models.classes`).

PEFT supports linear layers and parameters; a model cannot register its own layers for a
configuration that was read from a file. A function of PEFT is therefore wrapped when it is
imported: LoRA on `MPOCores` then works without further steps.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mpoe.models.table import MODEL_TYPES, TYPE_PREFIX

_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _place_holder(model_type: str, auto: Any) -> type:
    def real() -> Any:
        importlib.import_module("mpoe.models.classes").classes_of(
            model_type.removeprefix(TYPE_PREFIX)
        )
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


def teach_lora(module: Any) -> None:
    """Make LoRA (``peft.tuners.lora.model``) create our adapter for MPO weights, with any
    configuration."""
    known: Callable = module.LoraModel._create_new_module

    @functools.wraps(known)
    def create(lora_config: Any, adapter_name: str, target: Any, **kwargs: Any) -> Any:
        layers = sys.modules.get("mpoe.layers.cores")
        if layers is not None and isinstance(target, layers.MPOCores):
            importlib.import_module("mpoe.models.lora").lora_on_cores(lora_config)
        return known(lora_config, adapter_name, target, **kwargs)

    module.LoraModel._create_new_module = staticmethod(create)


# Module of another package -> function to run once it is imported
_AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    _AUTO_CONFIG: _register,
    "peft.tuners.lora.model": teach_lora,
}


class _Finder(MetaPathFinder):
    """Waits for the import of some modules, once each."""

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        after = self._waiting.pop(
            fullname, None
        )  # at once: the search below asks this finder again
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
    """Run the follow-ups of importing Transformers' `AutoConfig` and PEFT: now if they are already
    imported, otherwise later."""
    waiting = {}
    for name, after in _AFTER_IMPORT.items():
        if name in sys.modules:
            after(sys.modules[name])
        else:
            waiting[name] = after
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))
