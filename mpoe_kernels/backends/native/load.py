"""Finds and loads the compiled kernels, `mpoe_kernels/_C.abi3.so`, or says why that cannot be."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

import mpoe_kernels.version

LIBRARY = "_C.abi3.so"
# setup.py writes it where it does not build.
REASON_FILE = "_native_missing.txt"
OLDEST_TORCH = (2, 11)
# What the library tells of itself; one that tells less was built from older sources.
INFO_KEYS = {"version", "torch", "compiler", "isa_compiled", "isa_detected", "isa_used"}
BUILD_COMMAND = "python setup.py build_ext --inplace"


@dataclass(frozen=True)
class NativeLibrary:
    """What loading gave.

    Attributes:
        path: where the library was looked for.
        reasons: why it is not loaded (empty: it is).
        info: what it was built from and which instructions it uses: ``version``, ``torch``, ``compiler``,
            ``isa_compiled`` (names, separated by spaces), ``isa_detected``, ``isa_used``. Empty unless loaded.
    """

    path: Path
    reasons: tuple[str, ...] = ()
    info: dict[str, str] = field(default_factory=dict)


def _why_missing(folder: Path) -> str:
    record = folder / REASON_FILE
    if record.is_file():
        return f"it was not built: {record.read_text().strip()}"
    return f"{LIBRARY} is not in {folder}: in a source checkout run {BUILD_COMMAND}"


def load_library(folder: Path) -> NativeLibrary:
    """Load ``folder / "_C.abi3.so"``; its ops appear as ``torch.ops.mpoe_native``. Never raises for a bad file."""
    path = folder / LIBRARY
    if not path.is_file():
        return NativeLibrary(path, (_why_missing(folder),))
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return NativeLibrary(path, (f"it needs torch >= 2.11; this is {torch.__version__}",))
    try:
        torch.ops.load_library(path)
        text = torch.ops.mpoe_native.build_info()
    except (OSError, RuntimeError, AttributeError) as error:
        reason = f"{path} does not load on {platform.system()} {platform.machine()}: {error}"
        return NativeLibrary(path, (reason,))
    info = dict(line.split("=", 1) for line in text.splitlines())
    ours, built = mpoe_kernels.version.__version__, info.get("version")
    if built != ours or not info.keys() >= INFO_KEYS:
        built = f"mpoe {built}" if built != ours else "an older state of the sources"
        reason = f"{path} was built for {built}, this is mpoe {ours}: build again ({BUILD_COMMAND})"
        return NativeLibrary(path, (reason,))
    return NativeLibrary(path, (), info)


NATIVE_LIBRARY = load_library(Path(mpoe_kernels.version.__file__).resolve().parent)
