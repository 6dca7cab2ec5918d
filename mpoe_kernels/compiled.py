"""Finds and loads one of our compiled libraries, or says why it cannot be loaded."""

from __future__ import annotations

import hashlib
import platform
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mpoe_kernels.version

# Where setup.py puts the libraries, and the reasons if it built none.
FOLDER = Path(mpoe_kernels.version.__file__).resolve().parent
OLDEST_TORCH = (2, 11)
BUILD_COMMAND = "python setup.py build_ext --inplace"


@dataclass(frozen=True)
class CompiledLibrary:
    """The result of loading a library.

    Attributes:
        path: where the library was looked for.
        reasons: why it is not loaded (empty: it is loaded).
        info: its own description, such as ``version``, and ``build``, a checksum of its file. Empty
            unless loaded.
        functions: the opened module, for calls; None if its functions are torch ops.
    """

    path: Path
    reasons: tuple[str, ...] = ()
    info: dict[str, str] = field(default_factory=dict)
    functions: Any = None


def _why_missing(path: Path, reason_file: str) -> str:
    record = path.parent / reason_file
    if record.is_file():
        return f"it was not built: {record.read_text().strip()}"
    return f"{path.name} is not in {path.parent}: in a source checkout run {BUILD_COMMAND}"


def open_ops(namespace: str) -> Callable[[Path], tuple[str, None]]:
    """Opener of a library of torch ops for `load_library`: they appear as
    ``torch.ops.<namespace>``."""

    def opened(path: Path) -> tuple[str, None]:
        torch.ops.load_library(path)
        return getattr(torch.ops, namespace).build_info(), None

    return opened


def _digest(folder: Path) -> str:
    """Of all files in a folder, as CMakeLists.txt has it compiled into the library."""
    text = ""
    for file in sorted(folder.iterdir()):
        text += hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()


def load_library(
    path: Path,
    opened: Callable[[Path], tuple[str, Any]],
    reason_file: str,
    info_keys: set[str],
    bindings: Path | None = None,
) -> CompiledLibrary:
    """Load a library. Never raises for a bad file.

    Args:
        path: path of the library.
        opened: loads it; returns its description, as lines ``key=value``, and its functions.
        reason_file: file next to the library; setup.py writes it if it does not build.
        info_keys: keys that the description must have; otherwise it was built from older sources.
        bindings: folder of the sources of its functions; in a source checkout it must be built from
            those.
    """
    if not path.is_file():
        return CompiledLibrary(path, (_why_missing(path, reason_file),))
    major, minor = re.findall(r"\d+", torch.__version__)[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        return CompiledLibrary(path, (f"it needs torch >= 2.11; this is {torch.__version__}",))
    try:
        text, functions = opened(path)
    except (OSError, ImportError, RuntimeError, AttributeError) as error:
        reason = f"{path} does not load on {platform.system()} {platform.machine()}: {error}"
        return CompiledLibrary(path, (reason,))
    info = dict(line.split("=", 1) for line in text.splitlines())
    ours = mpoe_kernels.version.__version__
    built = info.get("version")
    is_old = (
        bindings is not None and bindings.is_dir() and info.get("bindings") != _digest(bindings)
    )
    if built != ours or is_old or not info.keys() >= info_keys:
        built = f"mpoe {built}" if built != ours else "an older state of the sources"
        reason = f"{path} was built for {built}, this is mpoe {ours}: build again ({BUILD_COMMAND})"
        return CompiledLibrary(path, (reason,))
    info["build"] = f"{zlib.crc32(path.read_bytes()):08x}"  # what of a version's many states it is
    return CompiledLibrary(path, (), info, functions)
