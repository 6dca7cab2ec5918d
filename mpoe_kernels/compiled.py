"""Finds and loads a compiled library of ours, or says why that cannot be."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import mpoe_kernels.version

# Where setup.py puts the libraries, and the reasons why there is none.
FOLDER = Path(mpoe_kernels.version.__file__).resolve().parent
OLDEST_TORCH = (2, 11)
BUILD_COMMAND = "python setup.py build_ext --inplace"


@dataclass(frozen=True)
class CompiledLibrary:
    """What loading gave.

    Attributes:
        path: where the library was looked for.
        reasons: why it is not loaded (empty: it is).
        info: what it tells of itself, such as ``version``. Empty unless loaded.
    """

    path: Path
    reasons: tuple[str, ...] = ()
    info: dict[str, str] = field(default_factory=dict)


def _why_missing(path: Path, reason_file: str) -> str:
    record = path.parent / reason_file
    if record.is_file():
        return f"it was not built: {record.read_text().strip()}"
    return f"{path.name} is not in {path.parent}: in a source checkout run {BUILD_COMMAND}"


def load_library(path: Path, namespace: str, reason_file: str, info_keys: set[str]) -> CompiledLibrary:
    """Load a library; its ops appear as ``torch.ops.<namespace>``. Never raises for a bad file.

    Args:
        path: of the library.
        namespace: of its ops; ``build_info`` among them answers with lines ``key=value``.
        reason_file: beside the library; setup.py writes it where it does not build.
        info_keys: what the library must tell of itself; one that tells less was built from older sources.
    """
    if not path.is_file():
        return CompiledLibrary(path, (_why_missing(path, reason_file),))
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return CompiledLibrary(path, (f"it needs torch >= 2.11; this is {torch.__version__}",))
    try:
        torch.ops.load_library(path)
        text = getattr(torch.ops, namespace).build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"{path} does not load on {platform.system()} {platform.machine()}: {error}"
        return CompiledLibrary(path, (reason,))
    info = dict(line.split("=", 1) for line in text.splitlines())
    ours, built = mpoe_kernels.version.__version__, info.get("version")
    if built != ours or not info.keys() >= info_keys:
        built = f"mpoe {built}" if built != ours else "an older state of the sources"
        reason = f"{path} was built for {built}, this is mpoe {ours}: build again ({BUILD_COMMAND})"
        return CompiledLibrary(path, (reason,))
    return CompiledLibrary(path, (), info)
