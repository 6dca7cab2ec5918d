"""Makes ``import mpoe`` enough for Transformers' Auto classes to know MPOE checkpoints, without importing Transformers.

Transformers takes seconds to import, and the command line must start at once. So only place-holders are registered
with `AutoConfig`, as soon as its module is there; the first MPOE checkpoint of a family that is opened makes and
registers the real classes (`mpoe.models.classes`).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
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


class _RegisteringLoader(Loader):
    """Loads a module as its own loader does, then registers the place-holders."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register(module)


class _Finder(MetaPathFinder):
    """Waits for the import of `AutoConfig`'s module, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO_CONFIG or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register() -> None:
    """Register with Transformers now if its `AutoConfig` is imported, else when it is."""
    if _AUTO_CONFIG in sys.modules:
        _register(sys.modules[_AUTO_CONFIG])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
