"""Packages that import their public names when these are first used."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def loader_of(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """``__getattr__`` of a package whose public names are in other modules.

    Args:
        package: its name.
        homes: module -> the names that are loaded from it on first use.
    """
    known = {name: home for home, names in homes.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in known:
            offered = ", ".join(sorted(known))
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}; it offers {offered}"
            )
        return getattr(importlib.import_module(known[name]), name)

    return load
